"""Reports after a run: costs, who pays them, and comparisons."""
