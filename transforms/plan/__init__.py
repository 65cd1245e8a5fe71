"""Stage *plan*: requests in token order, cut into shards."""
