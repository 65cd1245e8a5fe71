"""Batch inference for DeepSeek-class mixture-of-experts models as an Apache Beam workflow."""
