"""Checkpoint tensors, from their files to the device."""
