"""Our own engine on torch: DeepSeek-class mixture-of-experts models run from their checkpoints."""
