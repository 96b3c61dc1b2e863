// Recurrent dropout and zoneout of one value, for all scans. Dropout multiplies h with a mask where the recurrent product
// reads it, and stays out of the state. Zoneout leaves a state's old value: of units that State::kept has, or, without
// that mask, the expectation p * old + (1 - p) * now.
#pragma once

#include "cuda/scan.h"

namespace rnnkit::cuda {

// h, rounded as it is output, as the product reads it; the gradient of w_hh is a product with the same numbers.
template <class S>
RNNKIT_DEVICE S masked(S h, S mask) {
  return narrowed<S>(widened(h) * widened(mask));
}

// Whether State::kept has the unit; `at` is its place there.
RNNKIT_DEVICE bool keeps(const State& state, int64_t at) { return state.kept && state.kept[at]; }

// A state with zoneout after a step that found `old` and gave `now`.
template <class T>
RNNKIT_DEVICE T zoned(const State& state, bool keeps, T old, T now) {
  if (state.kept) return keeps ? old : now;
  const T p = static_cast<T>(state.zoneout);
  return p * old + (T(1) - p) * now;
}

// The two parts of the gradient of a state with zoneout after a step: of what the step gave, and of the old value.
template <class T>
RNNKIT_DEVICE T part_of_now(const State& state, bool keeps, T grad) {
  if (state.kept) return keeps ? T(0) : grad;
  return (T(1) - static_cast<T>(state.zoneout)) * grad;
}
template <class T>
RNNKIT_DEVICE T part_of_old(const State& state, bool keeps, T grad) {
  if (state.kept) return keeps ? grad : T(0);
  return static_cast<T>(state.zoneout) * grad;
}

// Whether a reserve has the h that each step gave, [D, rows, 1, H], for a cell whose backward pass reads it: from the
// state that took the expectation it could not be told. Where a mask kept the old value it has no gradient.
template <class Cell>
RNNKIT_ANYWHERE bool keeps_given(const State& h) {
  static_assert(!Cell::uses_h || (Cell::saved == 0 && Cell::states == 1), "the reserve's rows have nothing else");
  return Cell::uses_h && h.expects();
}

}  // namespace rnnkit::cuda
