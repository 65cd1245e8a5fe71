"""Scripted answers and failures."""
