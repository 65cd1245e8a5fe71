"""Dataflow: what a job needs there beside its job file, and the template that others start it from."""
