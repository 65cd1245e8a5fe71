"""Stage *read*: files to rows."""
