"""Prices, accounts and allocation."""
