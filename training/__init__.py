"""How the demo's checkpoint was made."""
