"""Checkpoint tensors, onto the device."""
