"""Runners beyond this process."""
