// Cells for tests/test_registered.py: those of csrc/cells, and some whose sizes no built-in cell has.
#include "cells/all.h"
#include "cpu/compiled_cell.h"

namespace rnnkit::RNNKIT_CAPABILITY {

// i, f = σ(x + h + p c), g = tanh(x + h), c' = f c + i g, o = σ(x + h + p c'), h' = o tanh(c').
struct Peephole {
  static constexpr int gates = 4, states = 2, saved = 5, grads = 4, parameters = 3;
  static constexpr bool uses_h = false, uses_previous_h = false;

  template <class V>
  static V new_c(const V* save) {
    return save[1] * save[4] + save[0] * save[2];
  }
  template <class V>
  static void forward(const V* x, const V* h, V* state, V* save, const V* p) {
    save[4] = state[1];
    save[0] = sigmoid(x[0] + h[0] + p[0] * save[4]);
    save[1] = sigmoid(x[1] + h[1] + p[1] * save[4]);
    save[2] = tanh(x[2] + h[2]);
    state[1] = new_c(save);
    save[3] = sigmoid(x[3] + h[3] + p[2] * state[1]);
    state[0] = save[3] * tanh(state[1]);
  }
  template <class V>
  static V output(const V* save, const V*) {
    return save[3] * tanh(new_c(save));
  }
  template <class V>
  static void grad_states(const V* save, V* grad_state, const V* p) {
    using T = Element<V>;
    const V o = save[3], tanh_c = tanh(new_c(save)), grad_o = grad_state[0] * tanh_c * o * (T(1) - o);
    grad_state[1] = grad_state[1] + grad_state[0] * o * (T(1) - tanh_c * tanh_c) + grad_o * p[2];
  }
  template <class V>
  static void backward(const V* save, V, V, V* grad_state, V* grad, const V* p) {
    using T = Element<V>;
    const V i = save[0], f = save[1], g = save[2], o = save[3], c = save[4];
    grad[3] = grad_state[0] * tanh(new_c(save)) * o * (T(1) - o);
    grad_states(save, grad_state, p);
    const V grad_c = grad_state[1];
    grad[0] = grad_c * g * i * (T(1) - i);
    grad[1] = grad_c * c * f * (T(1) - f);
    grad[2] = grad_c * i * (T(1) - g * g);
    grad[4] = grad[0] * c;
    grad[5] = grad[1] * c;
    grad[6] = grad[3] * new_c(save);
    grad_state[0] = V{};
    grad_state[1] = grad_c * f + grad[0] * p[0] + grad[1] * p[1];
  }
};

// h' = tanh(x + p h).
struct Independent {
  static constexpr int gates = 1, recurrent = 0, states = 1, saved = 0, grads = 1, parameters = 1;
  static constexpr bool uses_h = true, uses_previous_h = true;

  template <class V>
  static void forward(const V* x, const V*, V* state, V*, const V* p) {
    state[0] = tanh(x[0] + p[0] * state[0]);
  }
  template <class V>
  static void backward(const V*, V h, V previous_h, V* grad_state, V* grad, const V* p) {
    grad[0] = grad_state[0] * (Element<V>(1) - h * h);
    grad[1] = grad[0] * previous_h;
    grad_state[0] = grad[0] * p[0];
  }
};

// f = σ(x0 + h), n = tanh(x1 + h), h' = f h + (1 - f) n: the recurrent part has a gradient of its own.
struct TwoToOne {
  static constexpr int gates = 2, recurrent = 1, states = 1, saved = 2, grads = 3;
  static constexpr bool uses_h = false, uses_previous_h = true;

  template <class V>
  static void forward(const V* x, const V* h, V* state, V* save) {
    save[0] = sigmoid(x[0] + h[0]);
    save[1] = tanh(x[1] + h[0]);
    state[0] = save[1] + save[0] * (state[0] - save[1]);
  }
  template <class V>
  static void backward(const V* save, V, V previous_h, V* grad_state, V* grad) {
    using T = Element<V>;
    const V f = save[0], n = save[1];
    grad[1] = grad_state[0] * (previous_h - n) * f * (T(1) - f);
    grad[2] = grad_state[0] * (T(1) - f) * (T(1) - n * n);
    grad[0] = grad[1] + grad[2];
    grad_state[0] = grad_state[0] * f;
  }
};

// a = σ(x + h), c' = a c + 1 - a, h' = tanh(c'), whose derivative is made of h'.
struct TwoStates {
  static constexpr int gates = 1, states = 2, saved = 2, grads = 1;
  static constexpr bool uses_h = true, uses_previous_h = false;

  template <class V>
  static V new_c(const V* save) {
    return save[0] * save[1] + (Element<V>(1) - save[0]);
  }
  template <class V>
  static void forward(const V* x, const V* h, V* state, V* save) {
    save[0] = sigmoid(x[0] + h[0]);
    save[1] = state[1];
    state[1] = new_c(save);
    state[0] = tanh(state[1]);
  }
  template <class V>
  static void grad_states(const V* save, V* grad_state) {
    const V h = tanh(new_c(save));
    grad_state[1] = grad_state[1] + grad_state[0] * (Element<V>(1) - h * h);
  }
  template <class V>
  static void backward(const V* save, V h, V, V* grad_state, V* grad) {
    using T = Element<V>;
    const V grad_c = grad_state[1] + grad_state[0] * (T(1) - h * h);
    grad[0] = grad_c * (save[1] - T(1)) * save[0] * (T(1) - save[0]);
    grad_state[0] = V{};
    grad_state[1] = grad_c * save[0];
  }
};

// h' = tanh(x + h0) σ(h1).
struct OneToTwo {
  static constexpr int gates = 1, recurrent = 2, states = 1, saved = 2, grads = 2;
  static constexpr bool uses_h = false, uses_previous_h = false;

  template <class V>
  static void forward(const V* x, const V* h, V* state, V* save) {
    save[0] = tanh(x[0] + h[0]);
    save[1] = sigmoid(h[1]);
    state[0] = save[0] * save[1];
  }
  template <class V>
  static V output(const V* save) {
    return save[0] * save[1];
  }
  template <class V>
  static void backward(const V* save, V, V, V* grad_state, V* grad) {
    using T = Element<V>;
    grad[0] = grad_state[0] * save[1] * (T(1) - save[0] * save[0]);
    grad[1] = grad_state[0] * save[0] * save[1] * (T(1) - save[1]);
    grad_state[0] = V{};
  }
};

// a = σ(x + h), b = tanh(x + h), c' = a c + (1 - a) b, n' = a n + (1 - a) c', m' = m / 2 + b n, h' = tanh(c' + n' - m').
struct FourStates {
  static constexpr int gates = 2, states = 4, saved = 5, grads = 2;
  static constexpr bool uses_h = false, uses_previous_h = false;

  template <class V>
  static void step(const V* save, V* state) {
    using T = Element<V>;
    const V a = save[0], b = save[1], c = save[2], n = save[3], m = save[4];
    state[1] = a * c + (T(1) - a) * b;
    state[2] = a * n + (T(1) - a) * state[1];
    state[3] = m * T(0.5) + b * n;
    state[0] = tanh(state[1] + state[2] - state[3]);
  }
  template <class V>
  static void forward(const V* x, const V* h, V* state, V* save) {
    save[0] = sigmoid(x[0] + h[0]);
    save[1] = tanh(x[1] + h[1]);
    for (int k = 1; k < 4; ++k) save[k + 1] = state[k];
    step(save, state);
  }
  template <class V>
  static V output(const V* save) {
    V state[4];
    step(save, state);
    return state[0];
  }
  template <class V>
  static void grad_states(const V* save, V* grad_state) {
    using T = Element<V>;
    V state[4];
    step(save, state);
    const V grad_sum = grad_state[0] * (T(1) - state[0] * state[0]);
    grad_state[2] = grad_state[2] + grad_sum;
    grad_state[3] = grad_state[3] - grad_sum;
    grad_state[1] = grad_state[1] + grad_sum + (T(1) - save[0]) * grad_state[2];
  }
  template <class V>
  static void backward(const V* save, V, V, V* grad_state, V* grad) {
    using T = Element<V>;
    const V a = save[0], b = save[1], c = save[2], n = save[3];
    V state[4];
    step(save, state);
    grad_states(save, grad_state);
    const V grad_c = grad_state[1], grad_n = grad_state[2], grad_m = grad_state[3];
    grad[0] = (grad_n * (n - state[1]) + grad_c * (c - b)) * a * (T(1) - a);
    grad[1] = (grad_c * (T(1) - a) + grad_m * n) * (T(1) - b * b);
    grad_state[0] = V{};
    grad_state[1] = grad_c * a;
    grad_state[2] = grad_n * a + grad_m * b;
    grad_state[3] = grad_m * T(0.5);
  }
};

}  // namespace rnnkit::RNNKIT_CAPABILITY

using namespace rnnkit::RNNKIT_CAPABILITY;

RNNKIT_COMPILED_CELL(RnnTanh, rnn_tanh)
RNNKIT_COMPILED_CELL(RnnRelu, rnn_relu)
RNNKIT_COMPILED_CELL_THAT_PROJECTS(Lstm, lstm)
RNNKIT_COMPILED_CELL(Gru, gru)
RNNKIT_COMPILED_CELL_THAT_PROJECTS(Peephole, peephole)
RNNKIT_COMPILED_CELL(Independent, independent)
RNNKIT_COMPILED_CELL(TwoToOne, two_to_one)
RNNKIT_COMPILED_CELL(TwoStates, two_states)
RNNKIT_COMPILED_CELL_THAT_PROJECTS(OneToTwo, one_to_two)
RNNKIT_COMPILED_CELL_THAT_PROJECTS(FourStates, four_states)
