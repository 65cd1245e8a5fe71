"""Runs code that jobs, rows and checkpoints bring, such as templates, in processes with limits of their own."""
