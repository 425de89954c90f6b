"""`bitnet-mlx bench backends`: every engine that runs here, side by side, in six parts."""
