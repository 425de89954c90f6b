"""Layers over packed ternary weights for MLX."""
