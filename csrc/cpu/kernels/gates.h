// The products that make the gates, in panels of Cell::units hidden units with all their gates, so that the cell runs
// on a product that is still in L1.
#pragma once

#include "cells/all.h"
#include "cpu/kernels/scan.h"

namespace rnnkit::RNNKIT_CAPABILITY {

template <class Cell, class S>
class Gates {
 public:
  using T = Sum<S>;
  static constexpr int64_t kUnits = Cell::units, kWidth = Cell::gates * kUnits;

  // A matrix that is not packed is read as it lies.
  Gates(const Layer<S>& layer, bool pack_input, bool pack_recurrent, bool pack_projection, Arena& arena)
      : layer_(layer), panels_((layer.hidden + kUnits - 1) / kUnits) {
    const int64_t panels = layer.directions * panels_;
    w_ih_ = arena.take<S>(pack_input ? panels * layer.input * kWidth : 0);
    w_hh_ = arena.take<S>(pack_recurrent ? panels * layer.projected * kWidth : 0);
    bias_ = arena.take<T>(panels * 2 * kWidth);
    w_hr_ = arena.take<S>(pack_projection ? layer.directions * layer.hidden * round_up(layer.projected, kPanel) : 0);
  }

  int64_t panels() const { return panels_; }
  int64_t units_in(int64_t panel) const { return min_of(kUnits, layer_.hidden - panel * kUnits); }

  // Packs the weights and lays out the biases, this thread's part of them.
  void pack(int thread, int threads) const {
    const Range tasks = range_of(layer_.directions * panels_, thread, threads);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t d = task / panels_, p = task % panels_;
      const Direction<S>& weights = layer_.direction[d];
      pack_panel(weights.w_ih, layer_.input, w_ih_, d, p);
      pack_panel(weights.w_hh, layer_.projected, w_hh_, d, p);
      T* bias = bias_ + task * 2 * kWidth;
      std::memset(bias, 0, 2 * kWidth * sizeof(T));
      for (int64_t g = 0; g < Cell::gates; ++g) {
        const int64_t from = g * layer_.hidden + p * kUnits;
        if (weights.b_ih != nullptr) copy_row(weights.b_ih + from, units_in(p), bias + g * kUnits);
        if (weights.b_hh != nullptr) copy_row(weights.b_hh + from, units_in(p), bias + kWidth + g * kUnits);
      }
    }
    if (w_hr_ != nullptr) pack_projection(thread, threads);
  }

  // to[M, G*units] = the panel's part of x W_ih^T and of h W_hh^T.
  // `next` is the panel that is multiplied after this one, to be fetched meanwhile; p itself: none.
  void input(int64_t M, const S* x, int64_t d, int64_t p, int64_t next, T* to) const {
    multiply(M, layer_.input, x, w_ih_, layer_.direction[d].w_ih, d, p, next, to);
  }
  void recurrent(int64_t M, const S* h, int64_t d, int64_t p, int64_t next, T* to) const {
    multiply(M, layer_.projected, h, w_hh_, layer_.direction[d].w_hh, d, p, next, to);
  }

  // Whether the panel's part of W_hh times zeros is zeros.
  bool annuls_zeros(int64_t d, int64_t p) const {
    const int64_t K = layer_.projected;
    if (w_hh_ != nullptr) return all_finite(w_hh_ + (d * panels_ + p) * K * kWidth, K * kWidth);
    for (int64_t g = 0; g < Cell::gates; ++g)
      if (!all_finite(layer_.direction[d].w_hh + (g * layer_.hidden + p * kUnits) * K, units_in(p) * K)) return false;
    return true;
  }

  // to[M, kPanel] = columns first to first + columns of h W_hr^T, for h before the projection.
  void project(int64_t M, const S* h, int64_t d, int64_t first, int64_t columns, T* to) const {
    const int64_t H = layer_.hidden;
    if (w_hr_ == nullptr) return dot(M, columns, H, h, H, layer_.direction[d].w_hr + first * H, H, to, kPanel);
    const S* panel = w_hr_ + (d * round_up(layer_.projected, kPanel) + first) * H;
    gemm<S>(M, kPanel, H, rows_of(h, H), MatrixB<S>::packed(panel, H, kPanel), to, kPanel, false);
  }

  // A panel's biases [2, G*units].
  const T* bias(int64_t d, int64_t p) const { return bias_ + (d * panels_ + p) * 2 * kWidth; }

  // Both parts of each gate for the units from u on, with their biases; `input` and `recurrent` are rows of the above.
  template <class Count>
  static RNNKIT_INLINE void parts(const T* input, const T* recurrent, const T* bias, int64_t u, Count lanes,
                                  Vector<T>* x, Vector<T>* h) {
#pragma GCC unroll 4
    for (int64_t g = 0; g < Cell::gates; ++g) {
      x[g] = load(input + g * kUnits + u, lanes) + load(bias + g * kUnits + u);
      h[g] = load(recurrent + g * kUnits + u, lanes) + load(bias + kWidth + g * kUnits + u);
    }
  }

 private:
  // One panel of a weight matrix [G*H, K]: [K, G, units], in pairs of k where these are multiplied.
  void pack_panel(const S* w, int64_t K, S* packed, int64_t d, int64_t p) const {
    if (packed == nullptr) return;
    S* panel = packed + (d * panels_ + p) * K * kWidth;
    if (units_in(p) < kUnits) std::memset(panel, 0, K * kWidth * sizeof(S));
    for (int64_t g = 0; g < Cell::gates; ++g)
      pack_transposed(units_in(p), K, w + (g * layer_.hidden + p * kUnits) * K, K, panel, kWidth, g * kUnits);
  }

  void pack_projection(int thread, int threads) const {
    const int64_t H = layer_.hidden, per_direction = (layer_.projected + kPanel - 1) / kPanel;
    const Range tasks = range_of(layer_.directions * per_direction, thread, threads);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t d = task / per_direction, first = task % per_direction * kPanel;
      const int64_t columns = min_of(kPanel, layer_.projected - first);
      S* panel = w_hr_ + task * H * kPanel;
      if (columns < kPanel) std::memset(panel, 0, H * kPanel * sizeof(S));
      pack_transposed(columns, H, layer_.direction[d].w_hr + first * H, H, panel, kPanel, 0);
    }
  }

  void multiply(int64_t M, int64_t K, const S* a, const S* packed, const S* w, int64_t d, int64_t p, int64_t next,
                T* to) const {
    if (packed == nullptr) {
      for (int64_t g = 0; g < Cell::gates; ++g)
        dot(M, units_in(p), K, a, K, w + (g * layer_.hidden + p * kUnits) * K, K, to + g * kUnits, kWidth);
      return;
    }
    const S* panels = packed + d * panels_ * K * kWidth;
    gemm<S>(M, kWidth, K, rows_of(a, K), MatrixB<S>::packed(panels + p * K * kWidth, K, kWidth), to, kWidth, false,
            next != p ? panels + next * K * kWidth : nullptr);
  }

  const Layer<S>& layer_;
  const int64_t panels_;
  S *w_ih_, *w_hh_;  // [D, panels, I or P, G*units], or null
  T* bias_;          // [D, panels, 2, G*units]
  S* w_hr_;          // [D, panels, H, kPanel], or null
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
