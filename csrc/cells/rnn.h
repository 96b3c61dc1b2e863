// h' = f(x + h), where f is tanh or ReLU, and x and h are the input's and the recurrent part of the only gate.
#pragma once

#include "common/lanes.h"

namespace rnnkit::RNNKIT_CAPABILITY {

template <bool kRelu>
struct Rnn {
  static constexpr int gates = 1, states = 1, units = 64;
  static constexpr int saved = 0;  // backward() needs only h
  static constexpr int grads = 1;  // both parts of the gate have the same
  static constexpr int input_grad[] = {0};
  static constexpr bool uses_h = true, uses_previous_h = false, has_source = false;

  template <class V>
  static RNNKIT_INLINE void forward(const V* x, const V* h, V* state, V* /*save*/) {
    state[0] = kRelu ? relu(x[0] + h[0]) : tanh(x[0] + h[0]);
  }

  template <class V>
  static RNNKIT_INLINE V output(const V* /*save*/) {
    return V{};  // never called: h is not projected
  }

  template <class V>
  static RNNKIT_INLINE void backward(const V* /*save*/, V h, V /*previous_h*/, V* grad_state, V* grad) {
    grad[0] = kRelu ? relu_backward(grad_state[0], h) : grad_state[0] * (Element<V>(1) - h * h);
    grad_state[0] = V{};
  }
};

using RnnTanh = Rnn<false>;
using RnnRelu = Rnn<true>;

}  // namespace rnnkit::RNNKIT_CAPABILITY
