"""Weights that do not fit into memory: read layer by layer, while the layer before computes."""
