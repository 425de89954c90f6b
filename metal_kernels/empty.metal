// A launch and no work: what MLX and the device take for any kernel. x, y: float [32].
y[thread_index_in_simdgroup] = x[thread_index_in_simdgroup];
