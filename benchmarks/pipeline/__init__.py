"""The way of a row beside its parts: `python -m benchmarks.pipeline`."""
