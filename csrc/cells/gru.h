// r, z = sigmoid(x + h), n = tanh(x + r h); gate order r, z, n. h' = n + z (h - n) if the update gate z keeps the
// previous h, as in torch.nn; h' = h + z (n - h) if it writes, as in most textbooks.
#pragma once

#include "common/lanes.h"

namespace rnnkit::RNNKIT_CAPABILITY {

template <bool kWrites>
struct GruOf {
  static constexpr int gates = 3, states = 1, units = 16;
  static constexpr int saved = 4;  // r, z, n, the recurrent part of n
  static constexpr int grads = 4;  // of r, z, the recurrent part of n, the input's part of n
  static constexpr int input_grad[] = {0, 1, 3};
  static constexpr bool uses_h = false, uses_previous_h = true, has_source = false;

  template <class V>
  static RNNKIT_INLINE void forward(const V* x, const V* h, V* state, V* save) {
    save[0] = sigmoid(x[0] + h[0]);
    save[1] = sigmoid(x[1] + h[1]);
    save[2] = tanh(x[2] + save[0] * h[2]);
    save[3] = h[2];
    if constexpr (kWrites)
      state[0] = state[0] + save[1] * (save[2] - state[0]);
    else
      state[0] = save[2] + save[1] * (state[0] - save[2]);
  }

  template <class V>
  static RNNKIT_INLINE V output(const V* /*save*/) {
    return V{};  // never called: h is not projected
  }

  template <class V>
  static RNNKIT_INLINE void backward(const V* save, V /*h*/, V previous_h, V* grad_state, V* grad) {
    using T = Element<V>;
    const V r = save[0], z = save[1], n = save[2], recurrent = save[3];
    const V grad_h = grad_state[0], not_z = T(1) - z;
    const V written = kWrites ? z : not_z, kept = kWrites ? not_z : z;
    grad[3] = grad_h * written * (T(1) - n * n);
    grad[2] = grad[3] * r;
    grad[1] = grad_h * (kWrites ? n - previous_h : previous_h - n) * z * not_z;
    grad[0] = grad[3] * recurrent * r * (T(1) - r);
    grad_state[0] = grad_h * kept;
  }
};

using Gru = GruOf<false>;
using GruWrites = GruOf<true>;

}  // namespace rnnkit::RNNKIT_CAPABILITY
