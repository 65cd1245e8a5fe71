"""How many CPU threads a step runs on, decided while the engine runs."""
