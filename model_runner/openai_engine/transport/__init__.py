"""What every exchange with a provider is held to: bytes, seconds, encodings, and the address that was asked."""
