"""What `bitnet-mlx bench` measures. Figures are medians of one run, contenders in turns, on the machine that is named."""
