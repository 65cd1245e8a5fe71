"""Any Hugging Face causal LM; the oracle of the tests."""
