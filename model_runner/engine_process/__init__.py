"""Runs engines in separate processes."""
