"""Where keys and states of sequences lie, and how a step reads them."""
