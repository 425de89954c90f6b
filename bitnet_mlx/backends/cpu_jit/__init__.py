"""The CPU engine in numba: exact ternary products, float operations in the reference's order, one compiled call a token."""
