"""The notebook's way in: `run_job`."""
