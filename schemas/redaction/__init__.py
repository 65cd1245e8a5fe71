"""What the run knows and nobody may read: keys and credentials are hidden wherever text from outside is written."""
