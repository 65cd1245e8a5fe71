"""Answers that no table can hold."""
