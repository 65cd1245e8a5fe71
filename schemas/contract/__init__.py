"""What an answer must keep: schemas, typed columns, strict JSON."""
