"""A run inside of somebody else's pipeline: rows in, rows of answers out."""
