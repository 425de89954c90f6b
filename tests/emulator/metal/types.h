// Metal's types and address spaces in the words of C++ for OpenCL, whose address spaces clang enforces as Metal does.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define local local_name  // words that are names in Metal
#define global global_name
#define generic generic_name
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL__ 1
#define __METAL_VERSION__ 310

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef ulong uintptr_t;
typedef __bf16 bfloat;

#define VECTORS(T)                                       \
  typedef T T##2 __attribute__((ext_vector_type(2)));    \
  typedef T T##3 __attribute__((ext_vector_type(3)));    \
  typedef T T##4 __attribute__((ext_vector_type(4)))
VECTORS(char);
VECTORS(uchar);
VECTORS(short);
VECTORS(ushort);
VECTORS(int);
VECTORS(uint);
VECTORS(long);
VECTORS(ulong);
VECTORS(half);
VECTORS(float);
VECTORS(bfloat);
#undef VECTORS

namespace metal {
template <typename T, int n>
using vec = T __attribute__((ext_vector_type(n)));

template <bool b, typename T = void> struct enable_if {};
template <typename T> struct enable_if<true, T> { typedef T type; };
template <bool b, typename T = void> using enable_if_t = typename enable_if<b, T>::type;
template <bool b, typename T, typename U> struct conditional { typedef T type; };
template <typename T, typename U> struct conditional<false, T, U> { typedef U type; };
template <bool b, typename T, typename U> using conditional_t = typename conditional<b, T, U>::type;
template <typename T, T v> struct integral_constant {
  static constexpr constant T value = v;
  typedef T value_type;
  typedef integral_constant type;
  constexpr operator value_type() const thread { return v; }
};
template <bool b> using bool_constant = integral_constant<bool, b>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;
template <typename T, typename U> constexpr constant bool is_same_v = __is_same(T, U);
template <typename T, typename U> struct is_same : bool_constant<__is_same(T, U)> {};
template <typename T, typename U> constexpr constant bool is_convertible_v = __is_convertible_to(T, U);
template <typename T, typename U> struct is_convertible : bool_constant<__is_convertible_to(T, U)> {};
template <typename T> struct remove_cv { typedef __remove_cv(T) type; };
template <typename T> using remove_cv_t = typename remove_cv<T>::type;
template <typename T> struct is_integral : bool_constant<__is_integral(T)> {};
template <typename T> constexpr constant bool is_integral_v = __is_integral(T);
template <typename T> struct is_floating_point : bool_constant<__is_floating_point(T) || __is_same(T, half) || __is_same(T, bfloat)> {};
template <typename T> constexpr constant bool is_floating_point_v = is_floating_point<T>::value;
template <typename T> struct is_signed : bool_constant<__is_signed(T)> {};
template <typename T> constexpr constant bool is_signed_v = __is_signed(T);
template <typename T> struct is_unsigned : bool_constant<__is_unsigned(T)> {};
template <typename T> constexpr constant bool is_unsigned_v = __is_unsigned(T);
template <typename T> struct remove_addrspace { typedef T type; };
template <typename T> struct remove_addrspace<thread T> { typedef T type; };
template <typename T> struct remove_addrspace<device T> { typedef T type; };
template <typename T> struct remove_addrspace<constant T> { typedef T type; };
template <typename T> struct remove_addrspace<threadgroup T> { typedef T type; };
template <typename T> using remove_addrspace_t = typename remove_addrspace<T>::type;
template <typename T> struct is_arithmetic : bool_constant<is_integral<T>::value || is_floating_point<T>::value> {};

// The element of a scalar or vector, and how many there are.
template <typename T> struct lanes_of { typedef T element; static constexpr constant int count = 1; };
template <typename T, int n> struct lanes_of<T __attribute__((ext_vector_type(n)))> {
  typedef T element;
  static constexpr constant int count = n;
};

template <typename To, typename From>
METAL_FUNC constexpr To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs equal sizes");
  return __builtin_bit_cast(To, from);
}

// float4(x), float4(a, b), float4(v.xy, c, d): a vector from scalars and vectors. The macros below make calls of these.
template <typename V>
struct vector_maker {
  typedef typename lanes_of<V>::element E;
  V v;
  int at;
  template <typename A>
  constexpr void put(A a) thread {
    if constexpr (lanes_of<A>::count == 1) {
      v[at++] = static_cast<E>(a);
    } else {
      for (int i = 0; i < lanes_of<A>::count; i++) v[at++] = static_cast<E>(a[i]);
    }
  }
};
template <typename V, typename A>
METAL_FUNC constexpr V make_vector(A a) {
  if constexpr (lanes_of<V>::count == 1) {
    return static_cast<V>(a);
  } else if constexpr (lanes_of<A>::count == 1) {
    return V(static_cast<typename lanes_of<V>::element>(a));
  } else {
    static_assert(lanes_of<A>::count == lanes_of<V>::count, "a vector from one of another width");
    return __builtin_convertvector(a, V);
  }
}
template <typename V, typename A, typename B, typename... Rest>
METAL_FUNC constexpr V make_vector(A a, B b, Rest... rest) {
  static_assert(lanes_of<A>::count + lanes_of<B>::count + (0 + ... + lanes_of<Rest>::count) == lanes_of<V>::count,
                "a vector from too few or too many values");
  vector_maker<V> maker{V(0), 0};
  maker.put(a);
  maker.put(b);
  (maker.put(rest), ...);
  return maker.v;
}
}  // namespace metal
using metal::as_type;

// A macro with arguments leaves the name alone where no parenthesis follows it.
#define MAKE(T, ...) metal::make_vector<T>(__VA_ARGS__)
#define char2(...) MAKE(char2, __VA_ARGS__)
#define char3(...) MAKE(char3, __VA_ARGS__)
#define char4(...) MAKE(char4, __VA_ARGS__)
#define uchar2(...) MAKE(uchar2, __VA_ARGS__)
#define uchar3(...) MAKE(uchar3, __VA_ARGS__)
#define uchar4(...) MAKE(uchar4, __VA_ARGS__)
#define short2(...) MAKE(short2, __VA_ARGS__)
#define short3(...) MAKE(short3, __VA_ARGS__)
#define short4(...) MAKE(short4, __VA_ARGS__)
#define ushort2(...) MAKE(ushort2, __VA_ARGS__)
#define ushort3(...) MAKE(ushort3, __VA_ARGS__)
#define ushort4(...) MAKE(ushort4, __VA_ARGS__)
#define int2(...) MAKE(int2, __VA_ARGS__)
#define int3(...) MAKE(int3, __VA_ARGS__)
#define int4(...) MAKE(int4, __VA_ARGS__)
#define uint2(...) MAKE(uint2, __VA_ARGS__)
#define uint3(...) MAKE(uint3, __VA_ARGS__)
#define uint4(...) MAKE(uint4, __VA_ARGS__)
#define long2(...) MAKE(long2, __VA_ARGS__)
#define long3(...) MAKE(long3, __VA_ARGS__)
#define long4(...) MAKE(long4, __VA_ARGS__)
#define ulong2(...) MAKE(ulong2, __VA_ARGS__)
#define ulong3(...) MAKE(ulong3, __VA_ARGS__)
#define ulong4(...) MAKE(ulong4, __VA_ARGS__)
#define half2(...) MAKE(half2, __VA_ARGS__)
#define half3(...) MAKE(half3, __VA_ARGS__)
#define half4(...) MAKE(half4, __VA_ARGS__)
#define float2(...) MAKE(float2, __VA_ARGS__)
#define float3(...) MAKE(float3, __VA_ARGS__)
#define float4(...) MAKE(float4, __VA_ARGS__)
#define bfloat2(...) MAKE(bfloat2, __VA_ARGS__)
#define bfloat3(...) MAKE(bfloat3, __VA_ARGS__)
#define bfloat4(...) MAKE(bfloat4, __VA_ARGS__)
