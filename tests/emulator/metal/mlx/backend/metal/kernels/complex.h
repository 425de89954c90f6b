// In place of MLX's complex numbers, whose constructors for each address space this compiler does not take.
#pragma once
#include <metal_stdlib>
using namespace metal;
template <typename T>
struct complex_t {
  T real;
  T imag;
};
using complex32_t = complex_t<half>;
using complex64_t = complex_t<float>;
#define complex64_t(...) complex64_t{__VA_ARGS__}
