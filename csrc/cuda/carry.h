// Which rows of the batch have a step, and what each has before it.
//
// Sequences lie longest first, so at every step the active rows are the first ones. A row that is not active is carried:
// its states, or their gradients, stay as they are. An active row continues from the step before, or begins here with
// its initial states: all rows at the first step, and in the reverse direction rows of shorter sequences at later steps.
//
// The operand of a step's product is h that each row has before it. The step before writes it for the rows that it has;
// rows that begin find their initial h, which is written before the first step. The gradient that comes back through the
// product belongs to the step before, or, where a row begins, to its initial h: it is added to the row's carried gradient.
//
// A row that continues may be put back to other states between two steps, see reset of LayerCall in rnnkit/call.py.
// Forward, the earlier step writes these states, h in the operand too, after it has written its own results. Backward,
// what would pass back to the earlier step is added to their gradients.
#pragma once

#include "cuda/elements.h"

namespace rnnkit::cuda {

// What a step passes back: the gradient of a state before it. See grad_clip and grad_cut of LayerCall in rnnkit/call.py.
struct GradientRule {
  double clip;  // infinity for no limit
  int64_t cut;  // 0 for none

  // Whether no gradient passes back across the boundary before time t, between two steps.
  RNNKIT_ANYWHERE bool cuts(int64_t t) const { return cut > 0 && t % cut == 0; }
  // stopped: whether the boundary is cut, and the row continues across it.
  template <class T>
  RNNKIT_ANYWHERE T passed_back(T grad, bool stopped) const {
    if (stopped) return T(0);
    const T limit = static_cast<T>(clip);
    return grad > limit ? limit : grad < -limit ? -limit : grad;
  }
  // is_reset: whether the row is put back at the boundary. What would pass back is then added to `grad_reset`, the
  // gradient of the state that it is put back to, or to nothing if that is null.
  template <class T>
  RNNKIT_ANYWHERE T passed_back(T grad, bool stopped, bool is_reset, T* grad_reset) const {
    if (is_reset && grad_reset) *grad_reset += passed_back(grad, false);
    return passed_back(grad, stopped || is_reset);
  }
};

// Whether row n, which continues across a boundary between two steps, is put back there. resets: of the rows at that
// boundary; null where none is.
RNNKIT_ANYWHERE bool is_reset(const bool* resets, int64_t n) { return resets && resets[n]; }

// Rows of one step of one direction; before and after are the neighbours in the order of that direction's forward pass.
template <class Int>
struct Carry {
  Int active;  // rows that have this step
  Int before;  // rows that have the step before; 0 at the first step
  Int after;   // rows that have the step after; 0 at the last step

  RNNKIT_ANYWHERE bool is_active(Int n) const { return n < active; }
  // For an active row: before this step it has its initial states. Also true for rows that are over.
  RNNKIT_ANYWHERE bool begins(Int n) const { return n >= before; }
  // Rows that have this step and the one after.
  RNNKIT_ANYWHERE Int continuing() const { return active < after ? active : after; }
  // This step leaves the row's final states, whose gradients the backward pass begins with.
  RNNKIT_ANYWHERE bool ends(Int n) const { return n < active && n >= after; }
};

}  // namespace rnnkit::cuda
