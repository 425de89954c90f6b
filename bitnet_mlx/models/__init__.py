"""Decoders: one configuration, one set of weights, one graph for each engine."""
