"""Files, object stores and the layout of a run."""
