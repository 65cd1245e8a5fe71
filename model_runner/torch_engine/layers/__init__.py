"""Parts of a model's step: attention, experts, norms, rotations."""
