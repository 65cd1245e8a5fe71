"""The job file's sections."""
