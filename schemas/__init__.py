"""Frozen records, errors and table schemas that every other package speaks; no Beam, no torch."""
