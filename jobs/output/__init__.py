"""Reads, cleans and exports a run's output folder."""
