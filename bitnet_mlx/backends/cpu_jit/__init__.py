"""The CPU engine in numba: exact ternary products, floats in the reference's order, one compiled call a token."""
