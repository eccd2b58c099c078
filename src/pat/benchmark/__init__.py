"""How fast and how large a model is beside the one it was made from, and whether that is what was promised."""
