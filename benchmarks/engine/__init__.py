"""The torch engine beside others and beside a bound: `python -m benchmarks.engine`."""
