// The weights and biases that make the gates, for both directions, and the cell's forward on a row of gates. Gates come
// in panels of Cell::units hidden units, so that the cell works on a product that is still in L1.
#pragma once

#include "cells/all.h"
#include "cpu/kernels/matrix.h"
#include "cpu/kernels/scan.h"

namespace rnnkit::RNNKIT_CAPABILITY {

template <class Cell, class S>
class Gates {
 public:
  using T = Sum<S>;
  using V = Vector<T>;
  static constexpr int64_t kUnits = Cell::units, kWidth = Cell::gates * kUnits;
  using OfGates = TransposedMatrix<S, Cell::gates, kUnits>;
  using OfProjection = TransposedMatrix<S, 1, kPanel>;

  OfGates w_ih[2], w_hh[2];  // one for each direction
  OfProjection w_hr[2];

  // A matrix that is not packed is read where the layer has it.
  Gates(const Layer<S>& layer, bool pack_input, bool pack_recurrent, bool pack_projection, Arena& arena)
      : layer_(layer) {
    const int64_t I = layer.input, H = layer.hidden, P = layer.projected;
    for (int64_t d = 0; d < layer.directions; ++d) {
      const Direction<S>& weights = layer.direction[d];
      w_ih[d] = {weights.w_ih, H, I, arena.take<S>(pack_input ? OfGates::packed_size(H, I) : 0)};
      w_hh[d] = {weights.w_hh, H, P, arena.take<S>(pack_recurrent ? OfGates::packed_size(H, P) : 0)};
      w_hr[d] = {weights.w_hr, P, H, arena.take<S>(pack_projection ? OfProjection::packed_size(P, H) : 0)};
      bias_[d] = arena.take<T>(panels() * 2 * kWidth);
    }
  }

  int64_t panels() const { return OfGates::panels(layer_.hidden); }
  int64_t units_in(int64_t p) const { return w_hh[0].units_in(p); }

  // Packs the weights and lays out the biases, this thread's part of them.
  void pack(int thread, int threads) const {
    const Range tasks = range_of(layer_.directions * panels(), thread, threads);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t d = task / panels(), p = task % panels();
      const Direction<S>& weights = layer_.direction[d];
      w_ih[d].pack(p);
      w_hh[d].pack(p);
      T* bias = bias_[d] + p * 2 * kWidth;
      std::memset(bias, 0, 2 * kWidth * sizeof(T));
      for (int64_t g = 0; g < Cell::gates; ++g) {
        const int64_t from = g * layer_.hidden + p * kUnits;
        if (weights.b_ih != nullptr) copy_row(weights.b_ih + from, units_in(p), bias + g * kUnits);
        if (weights.b_hh != nullptr) copy_row(weights.b_hh + from, units_in(p), bias + kWidth + g * kUnits);
      }
    }
    const int64_t projection_panels = OfProjection::panels(layer_.projected);
    const Range of_projection = range_of(layer_.directions * projection_panels, thread, threads);
    for (int64_t task = of_projection.begin; task < of_projection.end; ++task)
      w_hr[task / projection_panels].pack(task % projection_panels);
  }

  // The biases of panel p [2, G*units]: of the input's and of the recurrent parts.
  const T* bias(int64_t d, int64_t p) const { return bias_[d] + p * 2 * kWidth; }

  // Writes a row of panel p of a product to its row of all gates, [G, H].
  void unpack(const T* panel, int64_t p, T* row) const {
#pragma GCC unroll 4
    for (int64_t g = 0; g < Cell::gates; ++g)
      copy_row(panel + g * kUnits, units_in(p), row + g * layer_.hidden + p * kUnits);
  }

  // The states of the units from u on before a step: from h, which is read only if the cell reads it, and from the other
  // states [kOthers, H].
  template <class Count>
  static RNNKIT_INLINE void load_states(const S* h, const T* others, int64_t H, int64_t u, Count lanes, V* state) {
    state[0] = Cell::uses_previous_h ? load(h + u, lanes) : V{};
#pragma GCC unroll 8
    for (int64_t k = 0; k < kOthers<Cell>; ++k) state[k + 1] = load(others + k * H + u, lanes);
  }

  // The cell's forward for the units from u on of a panel. `input`, `recurrent`: a row of w_ih's and of w_hh's product;
  // `state`: on entry before the step, on return after it; `save`: on return what Cell::saved counts.
  template <class Count>
  static RNNKIT_INLINE void cell(const T* input, const T* recurrent, const T* bias, int64_t u, Count lanes, V* state,
                                 V* save) {
    V x[Cell::gates], h[Cell::gates];
#pragma GCC unroll 4
    for (int64_t g = 0; g < Cell::gates; ++g) {
      x[g] = load(input + g * kUnits + u, lanes) + load(bias + g * kUnits + u);
      h[g] = load(recurrent + g * kUnits + u, lanes) + load(bias + kWidth + g * kUnits + u);
    }
    Cell::forward(x, h, state, save);
  }

  // Stores what a cell saves of some units to [Cell::saved, H].
  template <class Count>
  static RNNKIT_INLINE void store_saved(const V* save, int64_t H, Count lanes, T* to) {
#pragma GCC unroll 8
    for (int64_t k = 0; k < Cell::saved; ++k) store(to + k * H, save[k], lanes);
  }

 private:
  const Layer<S>& layer_;
  T* bias_[2];  // [panels, 2, G*units]
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
