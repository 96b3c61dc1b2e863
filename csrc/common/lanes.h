// Lane types and the functions of a lane that cells are written in.
//
// A cell is a template over a lane type V: a GCC/Clang vector of float or double here, so that the compiler's
// flags (SSE2, AVX2, AVX-512, NEON) choose the instructions; a plain float or double elsewhere (scalar.h).
#pragma once

#ifndef RNNKIT_CAPABILITY
#define RNNKIT_CAPABILITY baseline
#endif

#if defined(__CUDACC__) || defined(RNNKIT_SCALAR)
#include "common/scalar.h"
#else

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/dtypes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 11
#error "rnnkit's kernels need gcc 11 or later"
#endif

#define RNNKIT_INLINE inline __attribute__((always_inline))
#define RNNKIT_INLINE_LAMBDA __attribute__((always_inline))

namespace rnnkit::RNNKIT_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Lanes of T in one vector register.
template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
};
template <>
struct VectorOf<BFloat16> {};  // in registers it is float
template <class T>
using Vector = typename VectorOf<T>::type;

// The bits of a floating-point type, and what exp needs to know of them.
template <class T>
struct Format;
template <>
struct Format<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23, bias = 127, taylor = 7;
  static constexpr float ln2_high = 0.693145751953125f, ln2_low = 1.42860682030941723e-6f;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float exp_limit = 87.3f, tanh_limit = 18.1f;
};
template <>
struct Format<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52, bias = 1023, taylor = 13;
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double exp_limit = 708.3, tanh_limit = 38.2;
};

template <class T>
RNNKIT_INLINE Vector<T> splat(T value) {
  return value - Vector<T>{};
}

template <class T>
RNNKIT_INLINE Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(from);
}

template <class T>
RNNKIT_INLINE void store(T* to, Vector<T> value) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(to) = value;
}

// The first `count` lanes, the others 0.
template <class T>
RNNKIT_INLINE Vector<T> load(const T* from, int64_t count) {
  if (count >= kLanes<T>) return load(from);
  Vector<T> value{};
  std::memcpy(&value, from, count * sizeof(T));
  return value;
}

template <class T>
RNNKIT_INLINE void store(T* to, Vector<T> value, int64_t count) {
  if (count >= kLanes<T>)
    store(to, value);
  else
    std::memcpy(to, &value, count * sizeof(T));
}

// Stands for a count of all lanes, known to the compiler.
struct AllLanes {};

template <class T>
RNNKIT_INLINE Vector<T> load(const T* from, AllLanes) {
  return load(from);
}

template <class T>
RNNKIT_INLINE void store(T* to, Vector<T> value, AllLanes) {
  store(to, value);
}

// Calls body(first lane, count) for `count` values, a vector at a time; the count is AllLanes but for the last few.
template <class T, class Body>
RNNKIT_INLINE void for_vectors(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) body(i, AllLanes{});
  if (i < count) body(i, count - i);
}

#if defined(__AVX512BF16__)
// bfloat16 in memory, float in the register; rounded to nearest, ties to even.
RNNKIT_INLINE Vector<float> load(const BFloat16* from, int64_t count) {
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  Halves halves{};
  std::memcpy(&halves, from, (count < kLanes<float> ? count : kLanes<float>)*sizeof(BFloat16));
  return (Vector<float>)(__builtin_convertvector(halves, Bits) << 16);
}

RNNKIT_INLINE void store(BFloat16* to, Vector<float> value, int64_t count) {
  const __m256bh bits = _mm512_cvtneps_pbh((__m512)value);
  std::memcpy(to, &bits, (count < kLanes<float> ? count : kLanes<float>)*sizeof(BFloat16));
}

RNNKIT_INLINE Vector<float> load(const BFloat16* from, AllLanes) { return load(from, kLanes<float>); }
RNNKIT_INLINE void store(BFloat16* to, Vector<float> value, AllLanes) { store(to, value, kLanes<float>); }
#endif

// The element type of a lane type.
template <class V>
using Element = std::remove_cvref_t<decltype(std::declval<V>()[0])>;

// x between -limit and limit, else the nearer of these; NaN stays NaN. Written out for x86, whose minimum and maximum
// give the second operand where either is NaN; the compiler makes a comparison and a blend of the general form.
template <class V, class T = Element<V> >
RNNKIT_INLINE V clamp(V x, T limit) {
  const V low = splat(-limit), high = splat(limit);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return (V)_mm512_maskz_max_ps(-1, (__m512)low, _mm512_maskz_min_ps(-1, (__m512)high, (__m512)x));
  else
    return (V)_mm512_maskz_max_pd(-1, (__m512d)low, _mm512_maskz_min_pd(-1, (__m512d)high, (__m512d)x));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>)
    return (V)_mm256_max_ps((__m256)low, _mm256_min_ps((__m256)high, (__m256)x));
  else
    return (V)_mm256_max_pd((__m256d)low, _mm256_min_pd((__m256d)high, (__m256d)x));
#elif defined(__x86_64__)
  if constexpr (std::is_same_v<T, float>)
    return (V)_mm_max_ps((__m128)low, _mm_min_ps((__m128)high, (__m128)x));
  else
    return (V)_mm_max_pd((__m128d)low, _mm_min_pd((__m128d)high, (__m128d)x));
#else
  x = x > high ? high : x;
  return x < low ? low : x;
#endif
}

// exp(x) = scale * (1 + p), with scale a power of two and p = exp(r) - 1 for |r| <= ln(2)/2, so that p keeps
// its relative precision as x goes to 0. `limit` bounds |x|; NaN stays NaN.
template <class V>
struct SplitExp {
  V p, scale;
};

template <class V, class T = Element<V> >
RNNKIT_INLINE SplitExp<V> split_exp(V x, T limit) {
  using F = Format<T>;
  typedef typename F::Bits Bits __attribute__((vector_size(kVectorBytes)));
  x = clamp(x, limit);
  const V rounded = x * T(1.44269504088896340736) + F::round;
  const V n = rounded - F::round;
  const V r = (x - n * F::ln2_high) - n * F::ln2_low;
  // Taylor's series of (exp(r) - 1) / r; its remainder is below half a unit in the last place.
  constexpr double factorials[] = {1,     2,      6,       24,       120,       720,       5040,
                                   40320, 362880, 3628800, 39916800, 479001600, 6227020800};
  V series = splat(T(1 / factorials[F::taylor - 1]));
#pragma GCC unroll 16
  for (int k = F::taylor - 2; k >= 0; --k) series = series * r + T(1 / factorials[k]);
  Bits bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  bits = (bits << F::mantissa) + (static_cast<typename F::Bits>(F::bias) << F::mantissa);
  V scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return {series * r, scale};
}

// Exactly 0 and 1 far out, as torch's, so that a saturated gate's gradient is 0.
template <class V>
RNNKIT_INLINE V sigmoid(V x) {
  using T = Element<V>;
  const auto e = split_exp(-x, Format<T>::exp_limit);
  const V near = T(1) / (e.scale * e.p + e.scale + T(1));
  return x < -Format<T>::exp_limit ? V{} : near;
}

template <class V>
RNNKIT_INLINE V tanh(V x) {
  const auto e = split_exp(x + x, Format<Element<V> >::tanh_limit);
  const V expm1 = e.scale * e.p + (e.scale - Element<V>(1));
  return expm1 / (expm1 + Element<V>(2));
}

// NaN passes.
template <class V>
RNNKIT_INLINE V relu(V x) {
  return x < Element<V>(0) ? V{} : x;
}

// grad where the ReLU was open, that is, where its output is not 0 (NaN counts as open).
template <class V>
RNNKIT_INLINE V relu_backward(V grad, V output) {
  return output <= Element<V>(0) ? V{} : grad;
}

}  // namespace rnnkit::RNNKIT_CAPABILITY

#endif  // not scalar
