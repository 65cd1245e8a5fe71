"""Tables of a lakehouse: how job files name them."""
