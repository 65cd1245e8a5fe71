"""DeepSeek's own chat encodings."""
