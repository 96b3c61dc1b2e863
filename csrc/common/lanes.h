// Lane types, and the functions of a lane with which cells are written.
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

// A floating-point type's format, and constants of exp, tanh and log1p. exp_series: coefficients of
// (exp(r) - 1 - r) / r^2 for |r| <= ln(2)/2, the constant first. Those of float are minimax, which leaves exp(r) a
// sixteenth of a unit in the last place off; those of double are Taylor's. log_series: coefficients of
// (log((1 + s) / (1 - s)) / s - 2) / s^2 in s^2 for |s| <= 0.172.
template <class T>
struct Format;
template <>
struct Format<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float exp_series[] = {0.49999994f, 0.16666521f, 0.041668389f, 0.0083687305f, 0.0013814571f};
  static constexpr float ln2_high = 0.693145751953125f, ln2_low = 1.42860682030941723e-6f;
  static constexpr float round = 12582912.0f;                   // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float exp_limit = 88.f, tanh_limit = 9.05f;  // exp(-exp_limit) is 0
  static constexpr float exp_least = -105.f, exp_most = 89.f;   // further out exp is 0, or infinity
  static constexpr float log_series[] = {0.66666662693f, 0.40000972152f, 0.28498786688f, 0.24279078841f};
  static constexpr Bits one = 0x3f800000, sqrt_half = 0x3f3504f3;  // of 1 and sqrt(1/2)
  static constexpr float one_unit = 8388608.0f;                    // 2^23: its last bit is 1
  static constexpr float tiny = 2.9802322e-8f, infinity = __builtin_inff();
};
template <>
struct Format<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double exp_series[] = {1. / 2,       1. / 6,        1. / 24,        1. / 120,
                                          1. / 720,     1. / 5040,     1. / 40320,     1. / 362880,
                                          1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double exp_limit = 709., tanh_limit = 19.1;
  static constexpr double exp_least = -746., exp_most = 710.;
  static constexpr double log_series[] = {6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
                                          2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
                                          1.479819860511658591e-01};
  static constexpr Bits one = 0x3ff0000000000000, sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr double one_unit = 4503599627370496.0;  // 2^52
  static constexpr double tiny = 5.5511151231257827e-17, infinity = __builtin_inf();
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

// Loads the first `count` lanes; the others are 0.
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

// A count that is all lanes, which the compiler knows.
struct AllLanes {};

template <class T>
RNNKIT_INLINE Vector<T> load(const T* from, AllLanes) {
  return load(from);
}

template <class T>
RNNKIT_INLINE void store(T* to, Vector<T> value, AllLanes) {
  store(to, value);
}

// The first `count` lanes of a value, and zeros.
template <class V, class T = std::remove_cvref_t<decltype(std::declval<V>()[0])> >
RNNKIT_INLINE V first_lanes(V value, int64_t count) {
  T lanes[kLanes<T>];
  store(lanes, value);
  return load(static_cast<const T*>(lanes), count);
}

template <class V>
RNNKIT_INLINE V first_lanes(V value, AllLanes) {
  return value;
}

// A truth value in each lane: all bits are set, or none.
template <class T>
using Truth = decltype(Vector<T>{} < Vector<T>{});

template <class T>
RNNKIT_INLINE Truth<T> load_truth(const bool* from, int64_t count) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<T>)));
  Bytes bytes{};
  std::memcpy(&bytes, from, count < kLanes<T> ? count : kLanes<T>);
  return __builtin_convertvector(bytes, Truth<T>) != 0;
}

template <class T>
RNNKIT_INLINE Truth<T> load_truth(const bool* from, AllLanes) {
  return load_truth<T>(from, kLanes<T>);
}

// Calls body(first value, count) for `count` values, a vector at a time. The count of whole vectors is AllLanes.
template <class T, class Body>
RNNKIT_INLINE void for_vectors(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) body(i, AllLanes{});
  if (i < count) body(i, count - i);
}

// As for_vectors, for sums of many values: also gives body the number of one of four sums, to be added up side by side.
template <class T, class Body>
RNNKIT_INLINE void for_vectors_in_four(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= count; i += 4 * kLanes<T>) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) body(i + part * kLanes<T>, AllLanes{}, part);
  }
  for (; i + kLanes<T> <= count; i += kLanes<T>) body(i, AllLanes{}, 0);
  if (i < count) body(i, count - i, 0);
}

#if defined(__AVX512BF16__)
// bfloat16 in memory, float in registers; rounded to nearest, ties to even.
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

// min(x, limit); NaN stays NaN. x86's minimum, which gives its second operand if either is NaN, is written out: of the
// general form the compiler makes a comparison and a blend.
template <class V, class T = Element<V> >
RNNKIT_INLINE V at_most(V x, T limit) {
  const V most = splat(limit);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return (V)_mm512_maskz_min_ps(-1, (__m512)most, (__m512)x);
  else
    return (V)_mm512_maskz_min_pd(-1, (__m512d)most, (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>)
    return (V)_mm256_min_ps((__m256)most, (__m256)x);
  else
    return (V)_mm256_min_pd((__m256d)most, (__m256d)x);
#elif defined(__x86_64__)
  if constexpr (std::is_same_v<T, float>)
    return (V)_mm_min_ps((__m128)most, (__m128)x);
  else
    return (V)_mm_min_pd((__m128d)most, (__m128d)x);
#else
  return x > most ? most : x;
#endif
}

// The sign bit.
template <class T>
constexpr typename Format<T>::Bits kSign = typename Format<T>::Bits(1) << (8 * sizeof(T) - 1);

// A vector of the bits of a vector V.
template <class V>
struct BitsOfVector {
  typedef typename Format<Element<V> >::Bits type __attribute__((vector_size(kVectorBytes)));
};
template <class V>
using BitsOf = typename BitsOfVector<V>::type;

// exp(x) = scale * (1 + p), with scale a power of two and p = exp(r) - 1 for |r| <= ln(2)/2, so that p keeps its
// relative precision as x goes to 0. |x| is at most exp_limit, or x is NaN, which stays NaN.
template <class V>
struct SplitExp {
  V p, scale;
};

template <class V>
RNNKIT_INLINE SplitExp<V> split_exp(V x) {
  using T = Element<V>;
  using F = Format<T>;
  const V rounded = x * T(1.44269504088896340736) + F::round;
  const V n = rounded - F::round;
  const V r = (x - n * F::ln2_high) - n * F::ln2_low;
  constexpr int terms = sizeof(F::exp_series) / sizeof(T);
  V series = splat(F::exp_series[terms - 1]);
#pragma GCC unroll 16
  for (int k = terms - 2; k >= 0; --k) series = series * r + F::exp_series[k];
  BitsOf<V> bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  bits = (bits << F::mantissa) + (static_cast<typename F::Bits>(F::bias) << F::mantissa);
  V scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return {r * r * series + r, scale};
}

// With e = exp(-|x|): e / (e + 1) for x < 0, else 1 - e / (e + 1). Far out it is exactly 0 or 1, as torch's is, so that
// a saturated gate has gradient 0. Largest error for float: 2.4 units in the last place for x < 0 (torch: 2.5), 1.2 for
// x > 0.
template <class V>
RNNKIT_INLINE V sigmoid(V x) {
  using T = Element<V>;
  const V size = (V)((BitsOf<V>)x & ~kSign<T>);
  const auto split = split_exp(-at_most(size, Format<T>::exp_limit));
  const V e = split.scale * split.p + split.scale, small = e / (e + T(1));
  return x < T(0) ? small : T(1) - small;
}

// For float: x + x^3 P(x^2) near 0, with the minimax P of degree 6, and 1 - 2 / (exp(2 |x|) + 1) further out. Largest
// error: 0.96 units in the last place, 1.08 without fused multiply-adds (torch: 0.5). For double: (e - 1) / (e + 1)
// with e = exp(2 x), up to 3 units off.
template <class V>
RNNKIT_INLINE V tanh(V x) {
  using T = Element<V>;
  using F = Format<T>;
  const V size = (V)((BitsOf<V>)x & ~kSign<T>), bounded = at_most(size, F::tanh_limit);
  if constexpr (std::is_same_v<T, float>) {
    const auto e = split_exp(bounded + bounded);
    const V far = 1.f - 2.f / (e.scale * e.p + (e.scale + 1.f));
    constexpr float P[] = {-0.33333322f,   0.13332978f,   -0.053929303f,  0.021663543f,
                           -0.0082645444f, 0.0025826683f, -0.00045546016f};
    const V square = x * x;
    V series = splat(P[6]);
#pragma GCC unroll 8
    for (int k = 5; k >= 0; --k) series = series * square + P[k];
    return size < 0.9f ? x * square * series + x : (V)((BitsOf<V>)far | ((BitsOf<V>)x & kSign<T>));
  } else {
    const auto e = split_exp(bounded + bounded);
    const V expm1 = e.scale * e.p + (e.scale - T(1));
    return (V)((BitsOf<V>)(expm1 / (expm1 + T(2))) | ((BitsOf<V>)x & kSign<T>));
  }
}

// max(x, 0); NaN stays NaN.
template <class V>
RNNKIT_INLINE V relu(V x) {
  return x < Element<V>(0) ? V{} : x;
}

// The gradient of relu(x): grad where its output is not 0 (NaN counts as open), else 0.
template <class V>
RNNKIT_INLINE V relu_backward(V grad, V output) {
  return output <= Element<V>(0) ? V{} : grad;
}

// |x|.
template <class V>
RNNKIT_INLINE V abs(V x) {
  return (V)((BitsOf<V>)x & ~kSign<Element<V> >);
}

// a where the condition holds, else b.
template <class Condition, class V>
RNNKIT_INLINE V select(Condition condition, V a, V b) {
  return condition ? a : b;
}

// The larger of a and b; NaN where one is NaN.
template <class V>
RNNKIT_INLINE V maximum(V a, V b) {
  return (a > b) | (a != a) ? a : b;
}

// The smaller of a and b; NaN where one is NaN.
template <class V>
RNNKIT_INLINE V minimum(V a, V b) {
  return (a < b) | (a != a) ? a : b;
}

// 2^n for a whole n from -bias + 1 to bias.
template <class V>
RNNKIT_INLINE V power_of_two(V n) {
  using F = Format<Element<V> >;
  const V rounded = n + F::round;
  return (V)(((BitsOf<V>)rounded << F::mantissa) + (static_cast<typename F::Bits>(F::bias) << F::mantissa));
}

// exp(x) = 2^n (1 + p), see split_exp, with 2^n as two factors, each of which is a normal number. Largest error: 1 unit
// in the last place.
template <class V>
RNNKIT_INLINE V exp(V x) {
  using T = Element<V>;
  using F = Format<T>;
  const V below = at_most(x, F::exp_most), bounded = below < F::exp_least ? splat(F::exp_least) : below;
  const V n = (bounded * T(1.44269504088896340736) + F::round) - F::round;
  const V half = (n * T(0.5) + F::round) - F::round, scale = power_of_two(half);
  return (scale * split_exp(bounded).p + scale) * power_of_two(n - half);
}

// log(1 + x) = k ln(2) + log(m), with m next to 1: by s = f / (2 + f), f = m - 1, log(m) = 2 s + 2/3 s^3 + ..., and what
// rounding 1 + x to u left out comes to it as a part c of u. Largest error: 0.9 units in the last place.
template <class V>
RNNKIT_INLINE V log1p(V x) {
  using T = Element<V>;
  using F = Format<T>;
  using Bits = BitsOf<V>;
  const V u = x + T(1);
  const Bits moved = (Bits)u + (F::one - F::sqrt_half);  // the exponent is that of a number from sqrt(1/2) to sqrt(2)
  const V k = (V)((moved >> F::mantissa) | (Bits)splat(F::one_unit)) - (F::one_unit + T(F::bias));
  const V m = (V)((moved & ((typename F::Bits(1) << F::mantissa) - 1)) + F::sqrt_half);
  const auto near = k == T(0);
  const V f = select(near, x, m - T(1)), c = select(near, V{}, (x - (u - T(1))) / u);
  const V s = f / (f + T(2)), square = s * s, half = f * f * T(0.5);
  constexpr int terms = sizeof(F::log_series) / sizeof(T);
  V series = splat(F::log_series[terms - 1]);
#pragma GCC unroll 8
  for (int i = terms - 2; i >= 0; --i) series = series * square + F::log_series[i];
  const V log = k * F::ln2_high + (f - (half - (s * (half + square * series) + (k * F::ln2_low + c))));
  const V outside = select(x < T(-1), splat(T(__builtin_nan(""))), select(x == T(-1), splat(-F::infinity), x));
  return select(abs(x) < F::tiny, x, select((x > T(-1)) & (x < F::infinity), log, outside));
}

// log(1 + exp(x)); above 20 it is x, as in torch. Largest error: 1.7 units in the last place.
template <class V>
RNNKIT_INLINE V softplus(V x) {
  return select(x > Element<V>(20), x, log1p(exp(x)));
}

// log(1 / (1 + exp(-x))) = min(x, 0) - log(1 + exp(-|x|)). Largest error: 1.7 units in the last place.
template <class V>
RNNKIT_INLINE V logsigmoid(V x) {
  return select(x > Element<V>(0), V{}, x) - log1p(exp(-abs(x)));
}

}  // namespace rnnkit::RNNKIT_CAPABILITY

#endif  // not scalar
