"""What a run's folder says about its run."""
