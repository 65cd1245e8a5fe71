"""What survives a crash: commits, leases, journals, progress."""
