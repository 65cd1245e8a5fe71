"""Layers that models are built from: attention, experts, linear products, norms, rotations."""
