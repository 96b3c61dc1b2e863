// Element types that are not C++'s own, and the type that each is summed in.
#pragma once

#include <cstdint>

namespace rnnkit {

struct BFloat16 {
  uint16_t bits;  // the upper half of a float's
};

template <class S>
struct SumOf {
  using type = S;
};
template <>
struct SumOf<BFloat16> {
  using type = float;
};

// What values of type S are computed and accumulated in.
template <class S>
using Sum = typename SumOf<S>::type;

}  // namespace rnnkit
