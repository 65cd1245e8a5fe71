"""Any engine as a Beam `ModelHandler`."""
