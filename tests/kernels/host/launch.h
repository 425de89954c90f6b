// A launch's arrays, and the one function that each kernel's program adds to host.cpp.
#pragma once
#include "cuda.h"

namespace host {
constexpr unsigned MOST = 24;
extern unsigned char *inputs[MOST], *outputs[MOST];
extern mlx::core::cu::Shape shapes[MOST];
void call_kernel();  // with its arguments
}  // namespace host
