"""The contract of an answer: schemas, typed columns, strict JSON."""
