// What our kernels use of the header that MLX puts before every CUDA kernel: shapes are passed by value.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/cstdint>
namespace mlx::core::cu {
struct Shape {
  int32_t sizes[10];
  __device__ int32_t operator[](int i) const { return sizes[i]; }
};
}  // namespace mlx::core::cu
