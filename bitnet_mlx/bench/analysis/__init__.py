"""`bitnet-mlx bench analysis`: what holds one engine back, in seven parts, each measured and each with a verdict."""
