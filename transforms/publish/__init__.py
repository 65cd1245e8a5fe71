"""Stage *publish*: committed shards become tables and a manifest."""
