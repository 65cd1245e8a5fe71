"""Batch mode: requests as files that a provider answers within a day."""
