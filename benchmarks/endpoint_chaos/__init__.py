"""A provider that fails in every way it can, runs against it that are stopped meanwhile, and what must hold after."""
