"""Our GPU kernels: one description of a launch, run by MLX on Metal or CUDA, or by the tests' emulated grid."""
