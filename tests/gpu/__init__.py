"""The exactness tests of the kernels on a real GPU, through MLX: what scripts/gpu_check runs. Not collected by pytest."""
