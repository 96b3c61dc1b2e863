// Zoneout of one state for some units: a step leaves a unit's old value where State::kept has it, or, without a mask,
// the expectation p * old + (1 - p) * now. `place`: of the first unit in State::kept.
#pragma once

#include "common/lanes.h"
#include "cpu/kernels/shape.h"

namespace rnnkit::RNNKIT_CAPABILITY {

// The state after a step that gave `now`.
template <class T, class Count>
RNNKIT_INLINE Vector<T> zoned(const State<T>& state, int64_t place, Count lanes, Vector<T> old, Vector<T> now) {
  if (state.kept != nullptr) return load_truth<T>(state.kept + place, lanes) ? old : now;
  return state.zoneout * old + (T(1) - state.zoneout) * now;
}

// The two parts of a gradient of the state after a step: of what the step gave, and of the old value.
template <class T>
struct Parted {
  Vector<T> of_now, of_old;
};

template <class T, class Count>
RNNKIT_INLINE Parted<T> parted(const State<T>& state, int64_t place, Count lanes, Vector<T> grad) {
  if (!state.zones()) return {grad, Vector<T>{}};
  if (state.kept == nullptr) return {(T(1) - state.zoneout) * grad, state.zoneout * grad};
  const auto kept = load_truth<T>(state.kept + place, lanes);
  return {kept ? Vector<T>{} : grad, kept ? grad : Vector<T>{}};
}

// Whether the reserve has the h that each step gave, [D, rows, 1, H], for a cell whose backward pass reads it: of the
// state after a step that took the expectation it could only be guessed. Where a mask kept the old value it does not
// matter, since it has no gradient there.
template <class Cell, class S>
bool keeps_given(const Layer<S>& layer) {
  return shape_of<Cell>(layer).uses_h && layer.states[0].zones() && layer.states[0].kept == nullptr;
}

// What the reserve has of a row with Layer::keep, [values, H], see LayerCall.reserve_shape: first what the cell saved or,
// with Keep::states, the states other than h before the step.
struct ReserveRow {
  int64_t given;     // place of the h that the step gave, if keeps_given
  int64_t products;  // place of the products of all gates with x and then with h; there if the layer normalizes
  int64_t values;

  template <class Cell, class S>
  static ReserveRow of(const Layer<S>& layer) {
    const auto& shape = shape_of<Cell>(layer);
    const bool everything = layer.keep == Keep::everything;
    ReserveRow row{};
    row.given = everything ? shape.saved : shape.others;
    row.products = row.given + (keeps_given<Cell>(layer) ? 1 : 0);
    row.values = row.products + (everything && has_norms<Cell>(layer) ? 2 * shape.gates : 0);
    return row;
  }
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
