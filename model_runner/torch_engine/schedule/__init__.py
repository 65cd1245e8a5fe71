"""Which rows run in a step; free of torch."""
