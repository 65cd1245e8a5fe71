"""Stage *render*: rows to prompts and token ids."""
