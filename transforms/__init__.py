"""The stages of the way of a row, one file each: pure functions, then one PTransform."""
