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

template <class Cell, class S>
RNNKIT_DEVICE void forward_element(const Step& step, int64_t n, int64_t unit) {
  using T = Sum<S>;
  const int64_t hidden = step.hidden, at = n * hidden + unit, beside = n * step.stride + unit;
  T x[Cell::gates], h[Cell::gates], old[Cell::states], state[Cell::states], save[Cell::saved + 1];
#pragma unroll
  for (int g = 0; g < Cell::gates; ++g) {
    const int64_t row = g * hidden + unit;
    x[g] = read<S>(step.gates, n * step.gate_stride + row) + read<S>(step.b_ih, row);
    h[g] = read<S>(step.recurrent, n * Cell::gates * hidden + row) + read<S>(step.b_hh, row);
  }
  const bool begins = step.carry.begins(n), ends = step.carry.ends(n);
#pragma unroll
  for (int k = 0; k < Cell::states; ++k)
    old[k] = state[k] = begins ? initial_of<S>(step.states[k], at) : static_cast<const T*>(step.states[k].value)[at];
  T* const reserve = static_cast<T*>(step.reserve);
  if (step.keep == Keep::states)
#pragma unroll
    for (int k = 1; k < Cell::states; ++k) reserve[(n * (Cell::states - 1) + k - 1) * hidden + unit] = state[k];
  Cell::forward(x, h, state, save);
  if (keeps_given<Cell>(step.states[0]) && step.keep != Keep::nothing) reserve[at] = state[0];
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
    for (int k = 0; k < Cell::saved; ++k) reserve[(n * Cell::saved + k) * hidden + unit] = save[k];
}

template <class Cell, class S>
RNNKIT_DEVICE void backward_element(const Step& step, int64_t n, int64_t unit) {
  using T = Sum<S>;
  const int64_t hidden = step.hidden, at = n * hidden + unit, beside = n * step.stride + unit;
  T grad_state[Cell::states];
#pragma unroll
  for (int k = 0; k < Cell::states; ++k)
    grad_state[k] =
        step.carry.ends(n) ? read<S>(step.states[k].grad_final, at) : static_cast<const T*>(step.states[k].value)[at];
  if (n < step.grad_recurrent_rows) {
    T product = read<S>(step.grad_recurrent, at);
    if (step.operand_mask) product *= read<S>(step.operand_mask, at);
    grad_state[0] += product;
  }
  const auto grad_reset = [&](int k) {
    T* const grad = static_cast<T*>(step.states[k].grad_reset);
    return grad ? grad + at : nullptr;
  };
  if (n < step.grad_recurrent_rows && !step.projects)
    grad_state[0] = step.rule.passed_back(grad_state[0], step.cuts_after && step.carry.is_active(n),
                                          step.carry.is_active(n) && is_reset(step.resets_after, n), grad_reset(0));
  if (step.carry.is_active(n)) {
    T save[Cell::saved + 1], grads[Cell::grads], given[Cell::states], h = 0, previous_h = 0;
#pragma unroll
    for (int k = 0; k < Cell::saved; ++k)
      save[k] = static_cast<const T*>(step.reserve)[(n * Cell::saved + k) * hidden + unit];
    grad_state[0] += read<S>(step.states[0].grad_all, beside);
#pragma unroll
    for (int k = 1; k < Cell::states; ++k)
      if (step.states[k].grad_all) grad_state[k] += read<S>(step.states[k].grad_all, beside);
#pragma unroll
    for (int k = 0; k < Cell::states; ++k) {
      const State& of = step.states[k];
      given[k] = of.zones ? part_of_now(of, keeps(of, beside), grad_state[k]) : grad_state[k];
    }
    if (step.states[Cell::states - 1].flow) {
      T whole[Cell::states];
#pragma unroll
      for (int k = 0; k < Cell::states; ++k) whole[k] = given[k];
      if constexpr (Cell::states > 1) Cell::grad_states(save, whole);
#pragma unroll
      for (int k = 0; k < Cell::states; ++k)
        if (const State& of = step.states[k]; of.flow)
          static_cast<T*>(of.flow)[beside] = of.zones ? grad_state[k] : whole[k];
    }
    if constexpr (Cell::uses_h)
      h = keeps_given<Cell>(step.states[0]) ? static_cast<const T*>(step.reserve)[at]
                                            : read<S>(step.states[0].all, beside);
    const bool continues = !step.carry.begins(n), was_put_back = continues && is_reset(step.resets_before, n);
    if constexpr (Cell::uses_previous_h)
      previous_h = was_put_back ? read<S>(step.states[0].reset, at)
                   : continues  ? read<S>(step.previous_output, beside)
                                : read<S>(step.states[0].initial, at);
    Cell::backward(save, h, previous_h, given, grads);
#pragma unroll
    for (int k = 0; k < Cell::states; ++k) {
      if (const State& of = step.states[k]; of.zones) given[k] += part_of_old(of, keeps(of, beside), grad_state[k]);
      grad_state[k] = given[k];
    }
#pragma unroll
    for (int k = 1; k < Cell::states; ++k)
      grad_state[k] = step.rule.passed_back(grad_state[k], step.cuts_before && continues, was_put_back, grad_reset(k));
#pragma unroll
    for (int k = 0; k < Cell::grads; ++k)
      write<S>(step.grad_gates, n * step.grad_gate_stride + k * hidden + unit, grads[k]);
  }
#pragma unroll
  for (int k = 0; k < Cell::states; ++k) {
    static_cast<T*>(step.states[k].value)[at] = grad_state[k];
    write<S>(step.states[k].grad_initial, at, grad_state[k]);
  }
}

// h before its projection, from what a step saved of it.
template <class Cell, class S>
RNNKIT_DEVICE void unprojected_element(const Sum<S>* reserve, S* h, int64_t row, int64_t hidden, int64_t unit) {
  Sum<S> save[Cell::saved + 1];
#pragma unroll
  for (int k = 0; k < Cell::saved; ++k) save[k] = reserve[(row * Cell::saved + k) * hidden + unit];
  h[row * hidden + unit] = narrowed<S>(Cell::output(save));
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
