"""Dataflow: options, path checks and job templates."""
