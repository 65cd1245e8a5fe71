"""A run's tables in a lakehouse: one atomic commit for each, after the manifest, that repeating does not repeat."""
