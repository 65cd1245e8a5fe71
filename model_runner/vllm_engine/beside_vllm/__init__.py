"""What the worker brings into vLLM's interpreter: modules of the standard library and vLLM alone."""
