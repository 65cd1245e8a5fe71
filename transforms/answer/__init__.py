"""Stage *answer*: run, validate, account and commit one shard."""
