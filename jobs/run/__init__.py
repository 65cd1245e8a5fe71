"""Starts a run and watches it through the store."""
