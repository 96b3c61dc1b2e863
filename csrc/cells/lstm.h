// i, f, o = sigmoid(x + h), g = tanh(x + h), c' = f c + i g, h' = o tanh(c'); gate order i, f, g, o.
#pragma once

#include "common/lanes.h"

namespace rnnkit::RNNKIT_CAPABILITY {

struct Lstm {
  static constexpr int gates = 4, states = 2, units = 16;
  static constexpr int saved = 5;  // i, f, g, o, and c before the step
  static constexpr int grads = 4;  // of i, f, g, o: both parts of a gate have the same
  static constexpr int input_grad[] = {0, 1, 2, 3};
  static constexpr bool uses_h = false, uses_previous_h = false;

  template <class V>
  static RNNKIT_INLINE void forward(const V* x, const V* h, V* state, V* save) {
    save[0] = sigmoid(x[0] + h[0]);
    save[1] = sigmoid(x[1] + h[1]);
    save[2] = tanh(x[2] + h[2]);
    save[3] = sigmoid(x[3] + h[3]);
    save[4] = state[1];
    state[1] = save[1] * state[1] + save[0] * save[2];
    state[0] = save[3] * tanh(state[1]);
  }

  template <class V>
  static RNNKIT_INLINE V output(const V* save) {
    return save[3] * tanh(save[1] * save[4] + save[0] * save[2]);
  }

  template <class V>
  static RNNKIT_INLINE void grad_states(const V* save, V* grad_state) {
    using T = Element<V>;
    const V tanh_c = tanh(save[1] * save[4] + save[0] * save[2]);
    grad_state[1] = grad_state[1] + grad_state[0] * save[3] * (T(1) - tanh_c * tanh_c);
  }

  template <class V>
  static RNNKIT_INLINE void backward(const V* save, V /*h*/, V /*previous_h*/, V* grad_state, V* grad) {
    using T = Element<V>;
    const V i = save[0], f = save[1], g = save[2], o = save[3], c = save[4];
    const V tanh_c = tanh(f * c + i * g);
    const V grad_h = grad_state[0];
    const V grad_c = grad_state[1] + grad_h * o * (T(1) - tanh_c * tanh_c);
    grad[0] = grad_c * g * i * (T(1) - i);
    grad[1] = grad_c * c * f * (T(1) - f);
    grad[2] = grad_c * i * (T(1) - g * g);
    grad[3] = grad_h * tanh_c * o * (T(1) - o);
    grad_state[0] = V{};
    grad_state[1] = grad_c * f;
  }
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
