// One element of a step that is not persistent: the cell of one hidden unit and row of the batch, for kernels (step.cu)
// and for their host build.
#pragma once

#include "cuda/kernels.h"
#include "cuda/noise.h"

namespace rnnkit::cuda {

template <class S>
RNNKIT_DEVICE Sum<S> read(const void* array, int64_t index) {
  return array ? widened(static_cast<const S*>(array)[index]) : Sum<S>(0);
}

template <class S>
RNNKIT_DEVICE void write(void* array, int64_t index, Sum<S> value) {
  if (array) static_cast<S*>(array)[index] = narrowed<S>(value);
}

// The initial value of a row's state; 0 if none was given.
template <class S>
RNNKIT_DEVICE Sum<S> initial_of(const State& state, int64_t at) {
  return state.initial_is_wide ? static_cast<const Sum<S>*>(state.initial)[at] : read<S>(state.initial, at);
}

// Where a unit's value k of row n lies in a reserve.
RNNKIT_DEVICE int64_t reserve_place(const Step& step, int64_t n, int k, int64_t unit) {
  return (n * step.values + k) * step.hidden + unit;
}

// What the cell saved of a unit.
template <class Cell, class T>
RNNKIT_DEVICE void load_saved(const Step& step, int64_t n, int64_t unit, T* save) {
#pragma unroll
  for (int k = 0; k < Cell::saved; ++k) save[k] = static_cast<const T*>(step.reserve)[reserve_place(step, n, k, unit)];
}

// State k before the step.
template <class S>
RNNKIT_DEVICE Sum<S> before(const Step& step, int64_t n, int64_t unit, int k) {
  const int64_t at = n * step.hidden + unit;
  return step.carry.begins(n) ? initial_of<S>(step.states[k], at)
                              : static_cast<const Sum<S>*>(step.states[k].value)[at];
}

// What a step makes of a unit's products where nothing is normalized. layer_norm.h has another with the same functions.
template <class Cell, class S>
struct Plain {
  using T = Sum<S>;
  static constexpr int kColumns = Cell::grads;  // gradients of a unit

  // The product of gate g's weights with h.
  RNNKIT_DEVICE T recurrent(const Step& step, int64_t n, int g, int64_t unit) const {
    return read<S>(step.recurrent, (n * Cell::gates + g) * step.hidden + unit);
  }
  // As the cell's.
  RNNKIT_DEVICE void forward(const Step&, int64_t /*unit*/, const T* x, const T* h, T* state, T* save) const {
    Cell::forward(x, h, state, save);
  }
  RNNKIT_DEVICE T output(const Step&, int64_t /*unit*/, const T* save) const { return Cell::output(save); }
  RNNKIT_DEVICE void grad_states(const Step&, int64_t /*unit*/, const T* save, T* grad_state) const {
    if constexpr (Cell::states > 1) Cell::grad_states(save, grad_state);
  }
  RNNKIT_DEVICE void backward(const Step&, int64_t /*unit*/, const T* save, T h, T previous_h, T* grad_state,
                              T* grads) const {
    Cell::backward(save, h, previous_h, grad_state, grads);
  }
  RNNKIT_DEVICE void write_grads(const Step& step, int64_t n, int64_t unit, const T* grads) const {
#pragma unroll
    for (int k = 0; k < Cell::grads; ++k)
      write<S>(step.grad_gates, n * step.grad_gate_stride + k * step.hidden + unit, grads[k]);
  }
};

// The input's and the recurrent part of each gate, with biases.
template <class Cell, class S, class Row>
RNNKIT_DEVICE void load_gates(const Step& step, int64_t n, int64_t unit, const Row& row, Sum<S>* x, Sum<S>* h) {
#pragma unroll
  for (int g = 0; g < Cell::gates; ++g) {
    const int64_t column = g * step.hidden + unit;
    x[g] = read<S>(step.gates, n * step.gate_stride + column) + read<S>(step.b_ih, column);
    h[g] = row.recurrent(step, n, g, unit) + read<S>(step.b_hh, column);
  }
}

template <class Cell, class S, class Row>
RNNKIT_DEVICE void forward_element(const Step& step, int64_t n, int64_t unit, const Row& row) {
  using T = Sum<S>;
  const int64_t hidden = step.hidden, at = n * hidden + unit, beside = n * step.stride + unit;
  T x[Cell::gates], h[Cell::gates], old[Cell::states], state[Cell::states], save[Cell::saved + 1];
  load_gates<Cell, S>(step, n, unit, row, x, h);
#pragma unroll
  for (int k = 0; k < Cell::states; ++k) old[k] = state[k] = before<S>(step, n, unit, k);
  const bool ends = step.carry.ends(n);
  T* const reserve = static_cast<T*>(step.reserve);
  if (step.keep == Keep::states)
#pragma unroll
    for (int k = 1; k < Cell::states; ++k) reserve[reserve_place(step, n, k - 1, unit)] = state[k];
  row.forward(step, unit, x, h, state, save);
  if (keeps_given<Cell>(step.states[0]) && step.keep != Keep::nothing)
    reserve[reserve_place(step, n, 0, unit)] = state[0];
#pragma unroll
  for (int k = 0; k < Cell::states; ++k)
    if (const State& of = step.states[k]; of.zones) state[k] = zoned(of, keeps(of, beside), old[k], state[k]);
  const bool goes_back = !ends && is_reset(step.resets_after, n);
#pragma unroll
  for (int k = 0; k < Cell::states; ++k) {
    const StepState& of = step.states[k];
    write<S>(of.all, beside, state[k]);
    if (goes_back && !(k == 0 && step.projects)) state[k] = read<S>(of.reset, at);
    if (!ends)
      static_cast<T*>(of.value)[at] = state[k];
    else
      write<S>(of.final, at, state[k]);
  }
  S operand = narrowed<S>(state[0]);
  if (step.operand_mask) operand = masked(operand, static_cast<const S*>(step.operand_mask)[at]);
  if (step.h) static_cast<S*>(step.h)[at] = operand;
  if (step.keep == Keep::everything)
#pragma unroll
    for (int k = 0; k < Cell::saved; ++k) reserve[reserve_place(step, n, k, unit)] = save[k];
}

// The gradients of a unit's states that arrive at the step: from the steps after it and, of a row that has it, from its
// own outputs. Adds what rows put back after it would pass to it to the gradient of the h that they are put back to.
template <class Cell, class S>
RNNKIT_DEVICE void arriving(const Step& step, int64_t n, int64_t unit, Sum<S>* grad_state) {
  using T = Sum<S>;
  const int64_t at = n * step.hidden + unit, beside = n * step.stride + unit;
#pragma unroll
  for (int k = 0; k < Cell::states; ++k)
    grad_state[k] =
        step.carry.ends(n) ? read<S>(step.states[k].grad_final, at) : static_cast<const T*>(step.states[k].value)[at];
  if (n < step.grad_recurrent_rows) {
    T product = read<S>(step.grad_recurrent, at);
    if (step.operand_mask) product *= read<S>(step.operand_mask, at);
    grad_state[0] += product;
  }
  if (n < step.grad_recurrent_rows && !step.projects) {
    T* const grad_reset = static_cast<T*>(step.states[0].grad_reset);
    grad_state[0] = step.rule.passed_back(grad_state[0], step.cuts_after && step.carry.is_active(n),
                                          step.carry.is_active(n) && is_reset(step.resets_after, n),
                                          grad_reset ? grad_reset + at : nullptr);
  }
  if (!step.carry.is_active(n)) return;
  grad_state[0] += read<S>(step.states[0].grad_all, beside);
#pragma unroll
  for (int k = 1; k < Cell::states; ++k)
    if (step.states[k].grad_all) grad_state[k] += read<S>(step.states[k].grad_all, beside);
}

// What a unit's backward() takes, from the gradients that arrived.
template <class Cell, class S>
struct CellArguments {
  using T = Sum<S>;
  T save[Cell::saved + 1], given[Cell::states], h = 0, previous_h = 0;

  RNNKIT_DEVICE CellArguments(const Step& step, int64_t n, int64_t unit, const T* grad_state) {
    const int64_t beside = n * step.stride + unit;
    load_saved<Cell>(step, n, unit, save);
#pragma unroll
    for (int k = 0; k < Cell::states; ++k) {
      const State& of = step.states[k];
      given[k] = of.zones ? part_of_now(of, keeps(of, beside), grad_state[k]) : grad_state[k];
    }
    if constexpr (Cell::uses_h)
      h = keeps_given<Cell>(step.states[0]) ? static_cast<const T*>(step.reserve)[reserve_place(step, n, 0, unit)]
                                            : read<S>(step.states[0].all, beside);
    if constexpr (Cell::uses_previous_h) {
      const bool continues = !step.carry.begins(n);
      previous_h = continues && is_reset(step.resets_before, n) ? read<S>(step.states[0].reset, n * step.hidden + unit)
                   : continues ? read<S>(step.previous_output, beside)
                               : read<S>(step.states[0].initial, n * step.hidden + unit);
    }
  }
};

// The rest of the backward pass of a unit.
template <class Cell, class S, class Row>
RNNKIT_DEVICE void leave(const Step& step, int64_t n, int64_t unit, Sum<S>* grad_state, const Row& row) {
  using T = Sum<S>;
  const int64_t at = n * step.hidden + unit, beside = n * step.stride + unit;
  if (step.carry.is_active(n)) {
    CellArguments<Cell, S> of_cell(step, n, unit, grad_state);
    if (step.states[Cell::states - 1].flow) {
      T whole[Cell::states];
#pragma unroll
      for (int k = 0; k < Cell::states; ++k) whole[k] = of_cell.given[k];
      row.grad_states(step, unit, of_cell.save, whole);
#pragma unroll
      for (int k = 0; k < Cell::states; ++k)
        if (const State& of = step.states[k]; of.flow)
          static_cast<T*>(of.flow)[beside] = of.zones ? grad_state[k] : whole[k];
    }
    T grads[Row::kColumns];
    row.backward(step, unit, of_cell.save, of_cell.h, of_cell.previous_h, of_cell.given, grads);
#pragma unroll
    for (int k = 0; k < Cell::states; ++k) {
      T& grad = of_cell.given[k];
      if (const State& of = step.states[k]; of.zones) grad += part_of_old(of, keeps(of, beside), grad_state[k]);
      grad_state[k] = grad;
    }
    const bool continues = !step.carry.begins(n), was_put_back = continues && is_reset(step.resets_before, n);
#pragma unroll
    for (int k = 1; k < Cell::states; ++k) {
      T* const grad_reset = static_cast<T*>(step.states[k].grad_reset);
      grad_state[k] = step.rule.passed_back(grad_state[k], step.cuts_before && continues, was_put_back,
                                            grad_reset ? grad_reset + at : nullptr);
    }
    row.write_grads(step, n, unit, grads);
  }
#pragma unroll
  for (int k = 0; k < Cell::states; ++k) {
    static_cast<T*>(step.states[k].value)[at] = grad_state[k];
    write<S>(step.states[k].grad_initial, at, grad_state[k]);
  }
}

template <class Cell, class S>
RNNKIT_DEVICE void backward_element(const Step& step, int64_t n, int64_t unit) {
  Sum<S> grad_state[Cell::states];
  arriving<Cell, S>(step, n, unit, grad_state);
  leave<Cell, S>(step, n, unit, grad_state, Plain<Cell, S>());
}

// h before its projection, from what a step saved of it.
template <class Cell, class S, class Row>
RNNKIT_DEVICE void unprojected_element(const Step& step, int64_t n, int64_t unit, const Row& row) {
  Sum<S> save[Cell::saved + 1];
  load_saved<Cell>(step, n, unit, save);
  write<S>(step.h, n * step.hidden + unit, row.output(step, unit, save));
}

template <class S>
RNNKIT_DEVICE void add_element(const Addition& addition, int64_t n, int64_t column) {
  Sum<S> a = read<S>(addition.a.data, n * addition.a.stride + column);
  if (n < addition.masked && addition.mask) a *= read<S>(addition.mask, n * addition.width + column);
  if (n < addition.passed_back) {
    Sum<S>* const grad_reset = static_cast<Sum<S>*>(addition.grad_reset);
    a = addition.rule.passed_back(a, n < addition.stopped, is_reset(addition.resets, n),
                                  grad_reset ? grad_reset + n * addition.width + column : nullptr);
  }
  write<S>(addition.sum.data, n * addition.sum.stride + column,
           a + read<S>(addition.b.data, n * addition.b.stride + column));
}

template <class S>
RNNKIT_DEVICE void put_back_element(const PutBack& put_back, int64_t n, int64_t column) {
  const int64_t at = n * put_back.width + column;
  if (is_reset(put_back.resets, n)) write<S>(put_back.h, at, read<S>(put_back.reset, at));
}

// Calls body with a value of the C++ type.
template <class Body>
void with_type(Type type, const Body& body) {
  switch (type) {
    case Type::bfloat16:
      return body(BFloat16());
    case Type::half:
      return body(Half());
    case Type::float32:
      return body(float());
    case Type::float64:
      return body(double());
  }
}

}  // namespace rnnkit::cuda
