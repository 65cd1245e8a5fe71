"""A checkpoint's files, revision and limits."""
