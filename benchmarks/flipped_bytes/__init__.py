"""Flipped bits in the files of a run: `python -m benchmarks.flipped_bytes`."""
