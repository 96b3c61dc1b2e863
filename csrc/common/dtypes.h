// Element types that C++ does not have, and for each type the one in which it is summed.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define RNNKIT_ANYWHERE __host__ __device__ inline
#else
#define RNNKIT_ANYWHERE inline
#endif

namespace rnnkit {

struct BFloat16 {
  uint16_t bits;  // the upper half of a float's
};

struct Half {
  uint16_t bits;  // IEEE binary16
};

template <class S>
struct SumOf {
  using type = S;
};
template <>
struct SumOf<BFloat16> {
  using type = float;
};
template <>
struct SumOf<Half> {
  using type = float;
};

// The type in which values of type S are computed and summed.
template <class S>
using Sum = typename SumOf<S>::type;

}  // namespace rnnkit
