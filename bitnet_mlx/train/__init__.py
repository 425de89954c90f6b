"""Quantisation-aware training of ternary transformers."""
