// Elements as the GPU's kernels read and write them: conversions between what is stored and what is computed in, for
// the device and for the host build, to nearest, ties to even, on both.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtypes.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define RNNKIT_DEVICE __device__ __forceinline__
#else
#define RNNKIT_DEVICE inline
#endif

namespace rnnkit::cuda {

template <class To, class From>
RNNKIT_ANYWHERE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

RNNKIT_ANYWHERE float widened(float value) { return value; }
RNNKIT_ANYWHERE double widened(double value) { return value; }
RNNKIT_ANYWHERE float widened(BFloat16 value) { return bits_as<float>(uint32_t(value.bits) << 16); }
RNNKIT_ANYWHERE float widened(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_as<float>(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  // The exponent is moved by a product, which subnormal values survive.
  const float magnitude = bits_as<float>(rest << 13) * bits_as<float>(uint32_t(254 - 15) << 23);
  return bits_as<float>(bits_as<uint32_t>(magnitude) | sign);
#endif
}

// A value as it is stored in S.
template <class S>
struct Narrow;
template <>
struct Narrow<float> {
  static RNNKIT_ANYWHERE float of(float value) { return value; }
};
template <>
struct Narrow<double> {
  static RNNKIT_ANYWHERE double of(double value) { return value; }
};
template <>
struct Narrow<BFloat16> {
  static RNNKIT_ANYWHERE BFloat16 of(float value) {
#if defined(__CUDA_ARCH__)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    const uint32_t bits = bits_as<uint32_t>(value);
    if (value != value) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
  }
};
template <>
struct Narrow<Half> {
  static RNNKIT_ANYWHERE Half of(float value) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const uint32_t bits = bits_as<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {0x7fff};
    if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds beyond the largest
    if (magnitude < 0x38800000) {                                   // subnormal: the sum's last place is 2^-24
      const float shifted = bits_as<float>(magnitude) + 0.5f;
      return {uint16_t(sign | (bits_as<uint32_t>(shifted) - 0x3f000000))};
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return {uint16_t(sign | (rounded - 0x38000000) >> 13)};
#endif
  }
};

template <class S>
RNNKIT_ANYWHERE S narrowed(Sum<S> value) {
  return Narrow<S>::of(value);
}

// A float with the 10 bits of mantissa that TF32 products read.
RNNKIT_ANYWHERE float rounded_to_tf32(float value) {
#if defined(__CUDA_ARCH__)
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
#else
  const uint32_t bits = bits_as<uint32_t>(value);
  if ((bits & 0x7f800000) == 0x7f800000) return value;
  return bits_as<float>((bits + 0x1000) & ~0x1fffu);
#endif
}

}  // namespace rnnkit::cuda
