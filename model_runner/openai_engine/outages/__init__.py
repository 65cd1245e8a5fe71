"""Whose failure it is: the provider's, which is waited for, or a request's own, which becomes a reject."""
