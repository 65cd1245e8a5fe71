"""Runs jobs on Flink, Dataflow and other job servers."""
