"""What `bitnet-mlx bench` measures."""
