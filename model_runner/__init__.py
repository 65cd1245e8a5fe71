"""Engines behind one protocol, and what they share: prompt encoding and prefix arithmetic."""
