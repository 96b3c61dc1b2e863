// The lane type of a GPU's thread, and of the host build that tests the GPU's kernels: a plain float or double. The
// names are those of lanes.h, so that cells are written once.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define RNNKIT_INLINE __host__ __device__ __forceinline__
#else
#define RNNKIT_INLINE inline __attribute__((always_inline))
#endif

namespace rnnkit::RNNKIT_CAPABILITY {

template <class V>
using Element = V;

// Far out it is exactly 0 or 1, as torch's is, so that a saturated gate has gradient 0.
RNNKIT_INLINE float sigmoid(float x) {
#if defined(__CUDA_ARCH__)
  return __fdividef(1.f, 1.f + expf(-x));
#else
  return 1.f / (1.f + std::exp(-x));
#endif
}
RNNKIT_INLINE double sigmoid(double x) { return 1. / (1. + ::exp(-x)); }

RNNKIT_INLINE float tanh(float x) { return ::tanhf(x); }
RNNKIT_INLINE double tanh(double x) { return ::tanh(x); }

// max(x, 0); NaN stays NaN.
template <class V>
RNNKIT_INLINE V relu(V x) {
  return x < V(0) ? V(0) : x;
}

// The gradient of relu(x): grad where its output is not 0 (NaN counts as open), else 0.
template <class V>
RNNKIT_INLINE V relu_backward(V grad, V output) {
  return output <= V(0) ? V(0) : grad;
}

RNNKIT_INLINE float exp(float x) { return ::expf(x); }
RNNKIT_INLINE double exp(double x) { return ::exp(x); }

RNNKIT_INLINE float log1p(float x) { return ::log1pf(x); }
RNNKIT_INLINE double log1p(double x) { return ::log1p(x); }

// |x|.
template <class V>
RNNKIT_INLINE V abs(V x) {
  return x < V(0) ? -x : x + V(0);  // -0 + 0 is 0
}

// a where the condition holds, else b.
template <class V>
RNNKIT_INLINE V select(bool condition, V a, V b) {
  return condition ? a : b;
}

// The larger of a and b; NaN where one is NaN.
template <class V>
RNNKIT_INLINE V maximum(V a, V b) {
  return a > b || a != a ? a : b;
}

// The smaller of a and b; NaN where one is NaN.
template <class V>
RNNKIT_INLINE V minimum(V a, V b) {
  return a < b || a != a ? a : b;
}

// log(1 + exp(x)); above 20 it is x, as in torch.
template <class V>
RNNKIT_INLINE V softplus(V x) {
  return x > V(20) ? x : log1p(exp(x));
}

// log(1 / (1 + exp(-x))) = min(x, 0) - log(1 + exp(-|x|)).
template <class V>
RNNKIT_INLINE V logsigmoid(V x) {
  return (x > V(0) ? V(0) : x) - log1p(exp(-abs(x)));
}

}  // namespace rnnkit::RNNKIT_CAPABILITY
