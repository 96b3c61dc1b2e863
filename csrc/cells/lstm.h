// i, f, o = sigmoid(x + h), g = tanh(x + h), c' = f c + i g, h' = o tanh(c'); gate order i, f, g, o.
#pragma once

#include "common/lanes.h"

namespace rnnkit::RNNKIT_CAPABILITY {

struct Lstm {
  static constexpr int gates = 4, states = 2, units = 16;
  static constexpr int saved = 5;  // i, f, g, o, and c before the step
  static constexpr int grads = 4;  // of i, f, g, o: both parts of a gate have the same
  static constexpr int input_grad[] = {0, 1, 2, 3};
  static constexpr bool uses_h = false, uses_previous_h = false, has_source = true;

  template <class V>
  static RNNKIT_INLINE void activate(const V* x, const V* h, V* save) {
    save[0] = sigmoid(x[0] + h[0]);
    save[1] = sigmoid(x[1] + h[1]);
    save[2] = tanh(x[2] + h[2]);
    save[3] = sigmoid(x[3] + h[3]);
  }

  template <class V>
  static RNNKIT_INLINE V source(const V* save) {
    return save[1] * save[4] + save[0] * save[2];
  }

  template <class V>
  static RNNKIT_INLINE V output_of(const V* save, V source) {
    return save[3] * tanh(source);
  }

  template <class V>
  static RNNKIT_INLINE void forward(const V* x, const V* h, V* state, V* save) {
    activate(x, h, save);
    save[4] = state[1];
    state[1] = source(save);
    state[0] = output_of(save, state[1]);
  }

  template <class V>
  static RNNKIT_INLINE V output(const V* save) {
    return output_of(save, source(save));
  }

  template <class V>
  static RNNKIT_INLINE V grad_source(const V* save, V tanh_c, V grad_h) {
    return grad_h * save[3] * (Element<V>(1) - tanh_c * tanh_c);
  }

  template <class V>
  static RNNKIT_INLINE void grad_states(const V* save, V* grad_state) {
    grad_state[1] = grad_state[1] + grad_source(save, tanh(source(save)), grad_state[0]);
  }

  template <class V>
  static RNNKIT_INLINE void backward(const V* save, V /*h*/, V /*previous_h*/, V* grad_state, V* grad) {
    const V tanh_c = tanh(source(save));
    grad_state[1] = grad_state[1] + grad_source(save, tanh_c, grad_state[0]);
    backward_of(save, tanh_c, grad_state, grad);
  }

  template <class V>
  static RNNKIT_INLINE void backward_of(const V* save, V tanh_c, V* grad_state, V* grad) {
    using T = Element<V>;
    const V i = save[0], f = save[1], g = save[2], o = save[3], c = save[4];
    const V grad_h = grad_state[0], grad_c = grad_state[1];
    grad[0] = grad_c * g * i * (T(1) - i);
    grad[1] = grad_c * c * f * (T(1) - f);
    grad[2] = grad_c * i * (T(1) - g * g);
    grad[3] = grad_h * tanh_c * o * (T(1) - o);
    grad_state[0] = V{};
    grad_state[1] = grad_c * f;
  }
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
