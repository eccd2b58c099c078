"""Changing a model's weights: pure tensor functions, in float64 where exactness is decided."""
