"""Checks a job before it runs: job file, columns, engine, contract, output."""
