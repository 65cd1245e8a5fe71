"""Rows of CSV, JSON lines and Arrow files, as record batches with an error for each row that cannot be read."""
