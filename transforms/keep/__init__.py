"""Stage *keep*: rows of somebody else's collection to files of the run."""
