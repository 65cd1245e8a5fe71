"""Where keys and states of sequences are kept, and how a step reads and writes them."""
