// A cell's sizes as the kernels ask for them. shape_of<Cell>(layer).gates is a constant of a cell in cells/all.h; for
// Registered, which stands for every registered cell, it is read from Layer::cell.
#pragma once

#include "cells/all.h"
#include "cpu/layer.h"

namespace rnnkit::RNNKIT_CAPABILITY {

struct Registered {
  static constexpr bool has_source = false;
};

template <class Cell>
constexpr bool kIsRegistered = false;
template <>
inline constexpr bool kIsRegistered<Registered> = true;

// A built-in cell's; the members are those of RegisteredCell.
template <class Cell>
struct FixedShape {
  static constexpr int64_t gates = Cell::gates, recurrent = Cell::gates, late = 0, early = recurrent;
  static constexpr int64_t states = Cell::states, others = states - 1;
  static constexpr int64_t saved = Cell::saved, grads = Cell::grads, parameters = 0, columns = grads;
  static constexpr int64_t units = Cell::units;
  static constexpr const auto& input_grad = Cell::input_grad;
  static constexpr bool uses_h = Cell::uses_h, uses_previous_h = Cell::uses_previous_h;
};

template <class Cell, class S>
RNNKIT_INLINE const auto& shape_of([[maybe_unused]] const Layer<S>& layer) {
  if constexpr (kIsRegistered<Cell>) {
    return *layer.cell;
  } else {
    static constexpr FixedShape<Cell> shape;
    return shape;
  }
}

// The lengths of arrays over a cell's states, over what it saves, and over the columns of a panel.
template <class Cell>
constexpr int64_t kMostStates = Cell::states;
template <class Cell>
constexpr int64_t kMostSaved = Cell::saved;
template <class Cell>
constexpr int64_t kMostWidth = Cell::gates * Cell::units;
template <>
inline constexpr int64_t kMostStates<Registered> = kMaxStates;
template <>
inline constexpr int64_t kMostSaved<Registered> = 0;  // goes to memory at once
template <>
inline constexpr int64_t kMostWidth<Registered> = kMaxGates * 16;  // see register_cell in isa.cpp

// Calls body(k, whether k < count) for k = 0 to most - 1, unrolled, so that arrays over k can be registers also where only
// run time knows the count.
template <int64_t most, class Body>
RNNKIT_INLINE void for_most(int64_t count, const Body& body) {
#pragma GCC unroll 8
  for (int64_t k = 0; k < most; ++k) body(k, k < count);
}

// Whether h can be projected: not if the cell reads h, for only the projected one is kept.
template <class Cell, class S>
bool projects(const Layer<S>& layer) {
  const auto& shape = shape_of<Cell>(layer);
  return !shape.uses_h && !shape.uses_previous_h && layer.direction[0].w_hr != nullptr;
}

// Whether the layer has layer normalization, which no registered cell has.
template <class Cell, class S>
bool has_norms(const Layer<S>& layer) {
  return !kIsRegistered<Cell> && layer.normalizes();
}

}  // namespace rnnkit::RNNKIT_CAPABILITY
