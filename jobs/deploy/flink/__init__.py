"""Flink: runner, worker pool, and files for a local cluster, Maven and Kubernetes."""
