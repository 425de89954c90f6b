"""What a run's time went to: spans, their sums by part and layer, shares of the memory's speed, traces and pictures.

Nothing here runs a model; bench/profiled does.
"""
