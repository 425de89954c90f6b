// In place of CUDA's: our kernels use none of it.
#pragma once
namespace cooperative_groups {}
