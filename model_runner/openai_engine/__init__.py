"""The `openai` engine: any OpenAI-compatible endpoint as a `ModelRunner`; see `runner.py`."""
