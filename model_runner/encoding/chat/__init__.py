"""What all encodings share: messages as turns, formats of calls, parsed answers, and marks on tokens in data."""
