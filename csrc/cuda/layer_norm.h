// Layer normalization, n = (value - mean) / sqrt(variance + epsilon) of a row's values, which a factor multiplies, in a
// step: of the products with h over all gates, and of a cell's source (cells/all.h) over the units. torch normalizes the
// products with x before. A team, a block's threads or the host, has all units of a row, so that its sums need no others.
//
// A reserve that keeps everything has, after the cell's values, the products of all gates with x, which are not touched
// here, and those with h. The gradients have, before those of the gates, those of the products with h, and after them, of
// a cell with a source, those of its bias and of its factor, which are still to be summed over the rows.
//
// Between the sums of a row nothing is kept of its units, whose number is not known: each is computed again.
#pragma once

#include <cmath>

#include "cuda/step.h"

namespace rnnkit::cuda {

constexpr double kNormEpsilon = 1e-5;  // NORM_EPSILON in rnnkit/specs.py

// The sums over a row of two numbers of each value.
template <class T>
struct Pair {
  T first, second;
};

// A row's normalization.
template <class T>
struct Normalization {
  T mean, rstd;            // of the values; rstd = 1 / sqrt(variance + epsilon)
  T mean_of_grads, slope;  // the means of the gradients of n, and of their products with n

  // value(i): value i of the row.
  template <class Team, class Value>
  RNNKIT_DEVICE void find_moments(const Team& team, int64_t count, const Value& value) {
    mean = team.sums(count, [&](int64_t i) { return Pair<T>{value(i), 0}; }).first / static_cast<T>(count);
    const auto square = [&](int64_t i) {
      const T distance = value(i) - mean;
      return Pair<T>{distance * distance, 0};
    };
    rstd = 1 / std::sqrt(team.sums(count, square).first / static_cast<T>(count) + static_cast<T>(kNormEpsilon));
  }
  RNNKIT_DEVICE T normalized(T value) const { return (value - mean) * rstd; }

  // What the sums of gradients, first, and of their products, second, take of a value, from the gradient of n.
  RNNKIT_DEVICE Pair<T> of_grad(T value, T grad) const { return {grad, grad * normalized(value)}; }
  RNNKIT_DEVICE void set_means(const Pair<T>& sums, int64_t count) {
    mean_of_grads = sums.first / static_cast<T>(count);
    slope = sums.second / static_cast<T>(count);
  }
  // The gradient of a value from that of n.
  RNNKIT_DEVICE T passed(T value, T grad) const { return rstd * (grad - mean_of_grads - normalized(value) * slope); }
};

// What a step makes of a unit's products in row n, see Plain.
template <class Cell, class S>
class Normalized {
  using T = Sum<S>;
  static_assert(!Cell::has_source || Cell::saved == Cell::gates + 1, "the gates and state 1 before the step");

 public:
  static constexpr int kColumns = Cell::grads + (Cell::has_source ? 2 : 0);

  // Finds what the units' forward pass needs of their row.
  template <class Team>
  RNNKIT_DEVICE void begin_forward(const Step& step, int64_t n, const Team& team) {
    products_.find_moments(team, Cell::gates * step.hidden,
                           [&](int64_t column) { return read<S>(step.recurrent, row_of_products(step, n) + column); });
    if constexpr (Cell::has_source)
      source_.find_moments(team, step.hidden, [&](int64_t unit) {
        T x[Cell::gates], h[Cell::gates], save[Cell::saved];
        load_gates<Cell, S>(step, n, unit, *this, x, h);
        Cell::activate(x, h, save);
        save[Cell::saved - 1] = before<S>(step, n, unit, 1);
        return Cell::source(save);
      });
  }
  // And their output before a projection.
  template <class Team>
  RNNKIT_DEVICE void begin_output(const Step& step, int64_t n, const Team& team) {
    if constexpr (Cell::has_source)
      source_.find_moments(team, step.hidden, [&](int64_t unit) {
        T save[Cell::saved];
        load_saved<Cell>(step, n, unit, save);
        return Cell::source(save);
      });
  }
  // And their backward pass, from the gradients that arrived, which the states' values are.
  template <class Team>
  RNNKIT_DEVICE void begin_backward(const Step& step, int64_t n, const Team& team) {
    const T* const kept = kept_products(step, n);
    products_.find_moments(team, Cell::gates * step.hidden, [&](int64_t column) { return kept[column]; });
    begin_output(step, n, team);
    const auto arguments = [&](int64_t unit) {
      T grad_state[Cell::states];
      load_arrived(step, n, unit, grad_state);
      return CellArguments<Cell, S>(step, n, unit, grad_state);
    };
    if constexpr (Cell::has_source)
      source_.set_means(team.sums(step.hidden,
                                  [&](int64_t unit) {
                                    const CellArguments<Cell, S> of = arguments(unit);
                                    const T grad = grad_read(step, unit, of.save, of.given[0]);
                                    return source_.of_grad(Cell::source(of.save), grad * factor(step, unit));
                                  }),
                        step.hidden);
    products_.set_means(team.sums(step.hidden,
                                  [&](int64_t unit) {
                                    CellArguments<Cell, S> of = arguments(unit);
                                    T grads[kColumns];
                                    backward(step, unit, of.save, of.h, of.previous_h, of.given, grads);
                                    Pair<T> sums{0, 0};
#pragma unroll
                                    for (int g = 0; g < Cell::gates; ++g) {
                                      const int64_t column = g * step.hidden + unit;
                                      const Pair<T> of_gate =
                                          products_.of_grad(kept[column], grads[g] * read<S>(step.norms.hh, column));
                                      sums = {sums.first + of_gate.first, sums.second + of_gate.second};
                                    }
                                    return sums;
                                  }),
                        Cell::gates * step.hidden);
  }

  // Leaves row n's products with h in a reserve that keeps everything.
  template <class Team>
  static RNNKIT_DEVICE void keep_products(const Step& step, int64_t n, const Team& team) {
    T* const kept = kept_products(step, n);
    team.each(Cell::gates * step.hidden,
              [&](int64_t column) { kept[column] = read<S>(step.recurrent, row_of_products(step, n) + column); });
  }

  // The gradients of a unit's states that arrived at an active row.
  static RNNKIT_DEVICE void load_arrived(const Step& step, int64_t n, int64_t unit, T* grad_state) {
#pragma unroll
    for (int k = 0; k < Cell::states; ++k)
      grad_state[k] = static_cast<const T*>(step.states[k].value)[n * step.hidden + unit];
  }
  static RNNKIT_DEVICE void store_arrived(const Step& step, int64_t n, int64_t unit, const T* grad_state) {
#pragma unroll
    for (int k = 0; k < Cell::states; ++k)
      static_cast<T*>(step.states[k].value)[n * step.hidden + unit] = grad_state[k];
  }

  RNNKIT_DEVICE T recurrent(const Step& step, int64_t n, int g, int64_t unit) const {
    const int64_t column = g * step.hidden + unit;
    return products_.normalized(read<S>(step.recurrent, row_of_products(step, n) + column)) *
           read<S>(step.norms.hh, column);
  }
  RNNKIT_DEVICE void forward(const Step& step, int64_t unit, const T* x, const T* h, T* state, T* save) const {
    if constexpr (Cell::has_source) {
      Cell::activate(x, h, save);
      save[Cell::saved - 1] = state[1];
      state[1] = Cell::source(save);
      state[0] = output(step, unit, save);
    } else {
      Cell::forward(x, h, state, save);
    }
  }
  RNNKIT_DEVICE T output(const Step& step, int64_t unit, const T* save) const {
    if constexpr (Cell::has_source)
      return Cell::output_of(save, as_read(step, unit, save));
    else
      return Cell::output(save);
  }
  RNNKIT_DEVICE void grad_states(const Step& step, int64_t unit, const T* save, T* grad_state) const {
    if constexpr (Cell::has_source)
      grad_state[1] += passed(step, unit, save, grad_read(step, unit, save, grad_state[0]));
    else if constexpr (Cell::states > 1)
      Cell::grad_states(save, grad_state);
  }
  RNNKIT_DEVICE void backward(const Step& step, int64_t unit, const T* save, T h, T previous_h, T* grad_state,
                              T* grads) const {
    if constexpr (Cell::has_source) {
      const T grad = grad_read(step, unit, save, grad_state[0]);
      grads[Cell::grads] = grad;
      grads[Cell::grads + 1] = grad * source_.normalized(Cell::source(save));
      grad_state[1] += passed(step, unit, save, grad);
      Cell::backward_of(save, tanh(as_read(step, unit, save)), grad_state, grads);
    } else {
      Cell::backward(save, h, previous_h, grad_state, grads);
    }
  }
  RNNKIT_DEVICE void write_grads(const Step& step, int64_t n, int64_t unit, const T* grads) const {
    const int64_t place = n * step.grad_gate_stride + unit;
    const T* const kept = kept_products(step, n);
#pragma unroll
    for (int g = 0; g < Cell::gates; ++g) {
      const int64_t column = g * step.hidden + unit;
      write<S>(step.grad_gates, place + g * step.hidden,
               products_.passed(kept[column], grads[g] * read<S>(step.norms.hh, column)));
    }
#pragma unroll
    for (int k = 0; k < kColumns; ++k) write<S>(step.grad_gates, place + (Cell::gates + k) * step.hidden, grads[k]);
  }

 private:
  static RNNKIT_DEVICE int64_t row_of_products(const Step& step, int64_t n) { return n * Cell::gates * step.hidden; }
  static RNNKIT_DEVICE T* kept_products(const Step& step, int64_t n) {
    return static_cast<T*>(step.reserve) + reserve_place(step, n, step.values - Cell::gates, 0);
  }

  static RNNKIT_DEVICE T factor(const Step& step, int64_t unit) { return read<S>(step.norms.source, unit); }
  // The source as h' is made of it.
  RNNKIT_DEVICE T as_read(const Step& step, int64_t unit, const T* save) const {
    return source_.normalized(Cell::source(save)) * factor(step, unit) + read<S>(step.norms.source_bias, unit);
  }
  // The gradient of that, from that of h'.
  RNNKIT_DEVICE T grad_read(const Step& step, int64_t unit, const T* save, T grad_h) const {
    return Cell::grad_source(save, tanh(as_read(step, unit, save)), grad_h);
  }
  // And from it, that of the source.
  RNNKIT_DEVICE T passed(const Step& step, int64_t unit, const T* save, T grad) const {
    return source_.passed(Cell::source(save), grad * factor(step, unit));
  }

  Normalization<T> products_, source_;
};

template <class Cell, class S, class Team>
RNNKIT_DEVICE void forward_row(const Step& step, int64_t n, const Team& team) {
  Normalized<Cell, S> row;
  row.begin_forward(step, n, team);
  if (step.keep == Keep::everything) row.keep_products(step, n, team);
  team.each(step.hidden, [&](int64_t unit) { forward_element<Cell, S>(step, n, unit, row); });
}

template <class Cell, class S, class Team>
RNNKIT_DEVICE void backward_row(const Step& step, int64_t n, const Team& team) {
  using T = Sum<S>;
  Normalized<Cell, S> row;
  T grad_state[Cell::states];
  team.each(step.hidden, [&](int64_t unit) {
    arriving<Cell, S>(step, n, unit, grad_state);
    row.store_arrived(step, n, unit, grad_state);
  });
  if (step.carry.is_active(n)) row.begin_backward(step, n, team);
  team.each(step.hidden, [&](int64_t unit) {
    row.load_arrived(step, n, unit, grad_state);
    leave<Cell, S>(step, n, unit, grad_state, row);
  });
}

template <class Cell, class S, class Team>
RNNKIT_DEVICE void unprojected_row(const Step& step, int64_t n, const Team& team) {
  Normalized<Cell, S> row;
  row.begin_output(step, n, team);
  team.each(step.hidden, [&](int64_t unit) { unprojected_element<Cell, S>(step, n, unit, row); });
}

}  // namespace rnnkit::cuda
