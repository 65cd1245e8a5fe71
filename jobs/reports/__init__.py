"""What a run cost, who pays, and how that compares."""
