"""What a token mask can enforce of a schema or a tool call."""
