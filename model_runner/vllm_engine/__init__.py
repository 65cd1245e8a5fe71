"""vLLM in an interpreter of its own."""
