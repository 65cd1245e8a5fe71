"""A job on a Flink cluster: `python -m benchmarks.flink`."""
