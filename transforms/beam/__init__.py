"""Coders and counters that all stages share."""
