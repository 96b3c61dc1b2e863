// What a row of the batch has before a step of a scan. Who asks:
// - forward.h, where a row ends. It does not ask where a row begins: both operand buffers hold the initial h from the
//   start.
// - backward.h, where it takes the gradient of a step's operand, and for the previous h that a cell's backward reads.
// - segment.h, for the operands of many steps. The gradient of W_hh and recompute.h multiply with them.
//
// A row that continues may be put back to other states, see Layer::reset: `resets` tells. Forward.h then writes these
// after the step before; the others ask as above.
//
// Layer::operand_mask, with which the recurrent operand is multiplied, changes no state and is not a case of Before. It
// is applied in forward.h (prepare, cell, project), to the product in step_of_h of backward.h, and to the operands of
// many steps (MaskedOperands).
#pragma once

#include "cpu/layer.h"
#include "cpu/partition.h"

namespace rnnkit::RNNKIT_CAPABILITY {

enum class Before {
  previous,  // the state that the step before left
  initial,   // the initial state: the row's sequence begins at this step
  carried,   // the state stays as it is, and the step leaves the row out: its sequence is over or has yet to begin
};

// The rows of a range before one step. The longest sequences of a ragged batch come first, so that rows with the same
// answer are consecutive: first those that continue, then those that begin at this step; all others are carried.
struct Carry {
  int64_t continuing, active;

  bool carries(int64_t n) const { return n >= active; }
  Before of(int64_t n) const {
    return carries(n) ? Before::carried : n < continuing ? Before::previous : Before::initial;
  }
};

// The h that rows have before their first step, and that they are put back to: State::initial and State::reset as
// operands, [D, N, P] each. reset is null where Layer::reset is.
template <class S>
struct Beginnings {
  S *initial, *reset;
};

// Some rows of the batch in one direction. Steps are numbered in the order in which the forward scan takes them.
template <class S>
struct ActiveRows {
  const Layer<S>& layer;
  int64_t direction;
  Range range;  // of the batch

  // Where step s stands in x and y. It is its own inverse.
  int64_t time(int64_t s) const { return layer.reverses(direction) ? layer.steps - 1 - s : s; }

  // How many rows of the range step s has, from the first on; none before the first and after the last step.
  int64_t active(int64_t s) const {
    if (s < 0 || s >= layer.steps) return 0;
    return max_of(0, min_of(layer.count(time(s)), range.end) - range.begin);
  }

  Carry before(int64_t s) const {
    const int64_t now = active(s);
    return {min_of(active(s - 1), now), now};
  }

  // Whether step s passes no gradients back to the step before, see Layer::grad_cut.
  bool cuts(int64_t s) const {
    return layer.grad_cut > 0 && s > 0 && max_of(time(s), time(s - 1)) % layer.grad_cut == 0;
  }

  // Whether row n of the range, which continues from step s - 1 to step s, is put back between them.
  bool resets(int64_t s, int64_t n) const {
    if (layer.reset == nullptr) return false;
    return layer.reset[layer.begin(max_of(time(s), time(s - 1))) + range.begin + n];
  }

  // The index in x and y of the range's first row at step s.
  int64_t first(int64_t s) const { return layer.begin(time(s)) + range.begin; }

  // h before step s in row n of the range: after the step before, in y, or what the row begins with.
  const S* h_before(int64_t s, int64_t n, Carry carry, const Beginnings<S>& h) const {
    const int64_t row = (direction * layer.batch + range.begin + n) * layer.projected;
    if (carry.of(n) != Before::previous) return h.initial + row;
    if (resets(s, n)) return h.reset + row;
    return layer.y + ((first(s - 1) + n) * layer.directions + direction) * layer.projected;
  }
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
