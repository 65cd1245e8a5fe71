"""Starts, watches and retries runs."""
