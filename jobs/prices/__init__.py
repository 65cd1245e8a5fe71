"""The price book that ships with the program, and where it lies."""
