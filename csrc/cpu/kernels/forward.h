// The forward scan of one layer, for any cell.
//
// Weights lie in panels of Cell::units hidden units with all their gates, so that the cell runs on a product that is
// still in L1. A thread projects its own units' (or rows') inputs a few steps ahead, then takes these steps.
#pragma once

#include "cells/all.h"
#include "cpu/kernels/scan.h"

namespace rnnkit::RNNKIT_CAPABILITY {

template <class Cell, class T>
class Forward {
  static_assert(kFits<Cell>);

 public:
  Forward(const Layer<T>& layer, T* scratch)
      : layer_(layer),
        panels_((layer.hidden + kUnits - 1) / kUnits),
        pack_input_((layer.rows() + kDotRows - 1) / kDotRows > kFewSteps),
        pack_recurrent_(layer.steps * ((layer.batch + kDotRows - 1) / kDotRows) > kFewSteps),
        arena_(scratch) {
    const int64_t D = layer.directions, N = layer.batch;
    const bool projects = layer.direction[0].w_hr != nullptr;
    w_ih_ = arena_.take(pack_input_ ? D * panels_ * layer.input * kWidth : 0);
    w_hh_ = arena_.take(pack_recurrent_ ? D * panels_ * layer.projected * kWidth : 0);
    w_hr_ = arena_.take(projects && pack_recurrent_ ? D * layer.hidden * round_up(layer.projected, kPanel) : 0);
    bias_ = arena_.take(D * panels_ * 2 * kWidth);
    h_ = arena_.take(D * 2 * N * layer.projected);
    c_ = arena_.take(D * (Cell::states - 1) * N * layer.hidden);
    unprojected_ = arena_.take(projects ? D * N * layer.hidden : 0);
    gates_size_ = most(kAhead, N * panels_ * kWidth);
    gates_ = arena_.take(layer.threads * gates_size_);
  }

  int64_t scratch() const { return arena_.used(); }

  void run() {
    parallel(layer_.threads, [&](int thread, int threads, Barrier& all) {
      prepare(thread, threads);
      all.wait();
      const Split split(layer_, Cell::gates, threads);
      for_each_share(layer_, split, thread, threads, all,
                     [&](int64_t d, Range rows, int64_t member, int64_t members, Barrier& meet) {
                       scan(Rows<T>{layer_, d, rows}, member, members, gates_ + thread * gates_size_, meet);
                     });
    });
  }

 private:
  static constexpr int64_t kUnits = Cell::units, kWidth = Cell::gates * kUnits;
  static constexpr int64_t kAhead = 64 * 1024;  // elements of projected input that a thread keeps: within its L2

  int64_t units_in(int64_t panel) const { return least(kUnits, layer_.hidden - panel * kUnits); }

  // Packs the weights and lays out biases and initial states, this thread's part of them.
  void prepare(int thread, int threads) {
    const Range tasks = share(layer_.directions * panels_, thread, threads);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t d = task / panels_, p = task % panels_;
      const Direction<T>& weights = layer_.direction[d];
      if (pack_input_) pack(weights.w_ih, layer_.input, p, w_ih_ + task * layer_.input * kWidth);
      if (pack_recurrent_) pack(weights.w_hh, layer_.projected, p, w_hh_ + task * layer_.projected * kWidth);
      T* bias = bias_ + task * 2 * kWidth;
      std::memset(bias, 0, 2 * kWidth * sizeof(T));
      for (int64_t g = 0; g < Cell::gates; ++g) {
        const int64_t from = g * layer_.hidden + p * kUnits;
        const int64_t bytes = units_in(p) * sizeof(T);
        if (weights.b_ih != nullptr) std::memcpy(bias + g * kUnits, weights.b_ih + from, bytes);
        if (weights.b_hh != nullptr) std::memcpy(bias + kWidth + g * kUnits, weights.b_hh + from, bytes);
      }
    }
    if (layer_.direction[0].w_hr != nullptr && pack_recurrent_) prepare_projection(thread, threads);
    const Range states = share(layer_.directions * layer_.batch, thread, threads);
    for (int64_t i = states.begin; i < states.end; ++i) {
      const int64_t d = i / layer_.batch, n = i % layer_.batch, P = layer_.projected;
      for (int64_t buffer = 0; buffer < 2; ++buffer) copy_or_zero(h(d, buffer) + n * P, layer_.initial[0], i * P, P);
      if (Cell::states > 1) copy_or_zero(c_ + i * layer_.hidden, layer_.initial[1], i * layer_.hidden, layer_.hidden);
    }
  }

  void prepare_projection(int thread, int threads) {
    const int64_t per_direction = (layer_.projected + kPanel - 1) / kPanel;
    const Range tasks = share(layer_.directions * per_direction, thread, threads);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t d = task / per_direction, first = task % per_direction * kPanel;
      T* panel = w_hr_ + task * layer_.hidden * kPanel;
      const int64_t columns = least(kPanel, layer_.projected - first);
      if (columns < kPanel) std::memset(panel, 0, layer_.hidden * kPanel * sizeof(T));
      pack_transposed(columns, layer_.hidden, layer_.direction[d].w_hr + first * layer_.hidden, layer_.hidden, panel,
                      kPanel);
    }
  }

  // One panel of a weight matrix [G*H, K]: [K, G, units].
  void pack(const T* w, int64_t K, int64_t p, T* panel) const {
    if (units_in(p) < kUnits) std::memset(panel, 0, K * kWidth * sizeof(T));
    for (int64_t g = 0; g < Cell::gates; ++g)
      pack_transposed(units_in(p), K, w + (g * layer_.hidden + p * kUnits) * K, K, panel + g * kUnits, kWidth);
  }

  static void copy_or_zero(T* to, const T* from, int64_t offset, int64_t count) {
    if (from != nullptr)
      std::memcpy(to, from + offset, count * sizeof(T));
    else
      std::memset(to, 0, count * sizeof(T));
  }

  T* h(int64_t d, int64_t buffer) const { return h_ + (d * 2 + buffer) * layer_.batch * layer_.projected; }

  void scan(const Rows<T>& rows, int64_t member, int64_t members, T* gates, Barrier& meet) {
    const Range own = share(panels_, member, members);
    const int64_t per_row = most(1, own.size() * kWidth);
    for (int64_t s = 0; s < layer_.steps;) {
      int64_t end = s, ahead = 0;
      while (end < layer_.steps && (end == s || (ahead + rows.alive(end)) * per_row <= kAhead))
        ahead += rows.alive(end++);
      for (int64_t p = own.begin; p < own.end; ++p)
        project_input(rows, s, end, p, gates + (p - own.begin) * ahead * kWidth);
      for (int64_t done = 0; s < end; ++s) {
        for (int64_t p = own.begin; p < own.end; ++p)
          step(rows, s, p, gates + ((p - own.begin) * ahead + done) * kWidth);
        done += rows.alive(s);
        meet.wait();
        if (layer_.direction[0].w_hr == nullptr) continue;
        project_output(rows, s, share(layer_.projected, member, members, kPanel));
        meet.wait();
      }
    }
  }

  // gates[row, G*units] = x W_ih^T for visits s to end. Rows of one step lie together; so do those of all steps, in
  // the order of time, if all of the batch is ours.
  void project_input(const Rows<T>& rows, int64_t s, int64_t end, int64_t p, T* gates) {
    const bool whole = rows.range.size() == layer_.batch && rows.direction == 0;
    const int64_t I = layer_.input;
    for (; s < end; ++s) {
      int64_t count = rows.alive(s);
      const T* x = layer_.x + rows.first(s) * I;
      if (whole) {
        for (; s + 1 < end; ++s) count += rows.alive(s + 1);
      }
      multiply(count, I, x, pack_input_ ? w_ih_ + (rows.direction * panels_ + p) * I * kWidth : nullptr,
               layer_.direction[rows.direction].w_ih, p, gates);
      gates += count * kWidth;
    }
  }

  // to[M, G*units] = a[M, K] W^T for one panel, from the packed panel or, if that is null, from W as it lies.
  void multiply(int64_t M, int64_t K, const T* a, const T* panel, const T* w, int64_t p, T* to) const {
    if (panel != nullptr) return gemm<T>(M, kWidth, K, {a, K, 1}, panel, kWidth, to, kWidth, false);
    for (int64_t g = 0; g < Cell::gates; ++g)
      dot(M, units_in(p), K, a, K, w + (g * layer_.hidden + p * kUnits) * K, K, to + g * kUnits, kWidth);
  }

  // One step of one panel's units, for all rows alive.
  void step(const Rows<T>& rows, int64_t s, int64_t p, const T* gates) {
    const int64_t d = rows.direction, P = layer_.projected, alive = rows.alive(s);
    const T* h_before = h(d, s % 2) + rows.range.begin * P;
    const T* panel = pack_recurrent_ ? w_hh_ + (d * panels_ + p) * P * kWidth : nullptr;
    const bool from_zero = s == 0 && layer_.initial[0] == nullptr;
    alignas(64) T recurrent[kRowBlock * kWidth];
    for (int64_t m = 0; m < alive; m += kRowBlock) {
      const int64_t count = least(kRowBlock, alive - m);
      if (from_zero)
        std::memset(recurrent, 0, count * kWidth * sizeof(T));
      else
        multiply(count, P, h_before + m * P, panel, layer_.direction[d].w_hh, p, recurrent);
      cell(rows, s, p, m, count, gates + m * kWidth, recurrent);
    }
  }

  // The cell, for rows m to m + count of the range and one panel's units.
  void cell(const Rows<T>& rows, int64_t s, int64_t p, int64_t m, int64_t count, const T* gates, const T* recurrent) {
    using V = Vector<T>;
    const int64_t d = rows.direction, H = layer_.hidden, P = layer_.projected, width = layer_.directions * P;
    const int64_t ending = rows.alive(s + 1);  // rows from here on are in their last step
    const T* bias = bias_ + (d * panels_ + p) * 2 * kWidth;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = rows.range.begin + m + i, row = rows.first(s) + m + i;
      for (int64_t u = 0; u < units_in(p); u += kLanes<T>) {
        const int64_t unit = p * kUnits + u, lanes = least(kLanes<T>, H - unit);
        V input[Cell::gates], from_h[Cell::gates], state[Cell::states], save[Cell::saved];
#pragma GCC unroll 4
        for (int64_t g = 0; g < Cell::gates; ++g) {
          const int64_t column = g * kUnits + u;
          input[g] = load(gates + i * kWidth + column, lanes) + load(bias + column);
          from_h[g] = load(recurrent + i * kWidth + column, lanes) + load(bias + kWidth + column);
        }
        state[0] = Cell::uses_previous_h ? load(h(d, s % 2) + n * P + unit, lanes) : V{};
        const int64_t c = (d * layer_.batch + n) * H + unit;
        if constexpr (Cell::states > 1) state[1] = load(c_ + c, lanes);
        Cell::forward(input, from_h, state, save);
        if (layer_.reserve != nullptr) {
          T* to = layer_.reserve + (d * layer_.rows() + row) * Cell::saved * H + unit;
#pragma GCC unroll 8
          for (int64_t k = 0; k < Cell::saved; ++k) store(to + k * H, save[k], lanes);
        }
        if constexpr (Cell::states > 1) {
          store(c_ + c, state[1], lanes);
          if (m + i >= ending) store(layer_.final[1] + c, state[1], lanes);
        }
        if (unprojected_ != nullptr) {
          store(unprojected_ + c, state[0], lanes);
          continue;
        }
        store(h(d, (s + 1) % 2) + n * P + unit, state[0], lanes);
        store(layer_.y + row * width + d * P + unit, state[0], lanes);
        if (m + i >= ending) store(layer_.final[0] + (d * layer_.batch + n) * P + unit, state[0], lanes);
      }
    }
  }

  // h = h W_hr^T, the columns in `own`.
  void project_output(const Rows<T>& rows, int64_t s, Range own) {
    const int64_t d = rows.direction, H = layer_.hidden, P = layer_.projected, alive = rows.alive(s);
    const T* from = unprojected_ + (d * layer_.batch + rows.range.begin) * H;
    alignas(64) T block[kRowBlock * kPanel];
    for (int64_t first = own.begin; first < own.end; first += kPanel) {
      const int64_t columns = least(kPanel, P - first);
      for (int64_t m = 0; m < alive; m += kRowBlock) {
        const int64_t count = least(kRowBlock, alive - m);
        if (pack_recurrent_)
          gemm<T>(count, kPanel, H, {from + m * H, H, 1}, w_hr_ + (d * round_up(P, kPanel) + first) * H, kPanel, block,
                  kPanel, false);
        else
          dot(count, columns, H, from + m * H, H, layer_.direction[d].w_hr + first * H, H, block, kPanel);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t n = rows.range.begin + m + i, bytes = columns * sizeof(T);
          const T* row = block + i * kPanel;
          std::memcpy(h(d, (s + 1) % 2) + n * P + first, row, bytes);
          std::memcpy(layer_.y + ((rows.first(s) + m + i) * layer_.directions + d) * P + first, row, bytes);
          if (m + i >= rows.alive(s + 1)) std::memcpy(layer_.final[0] + (d * layer_.batch + n) * P + first, row, bytes);
        }
      }
    }
  }

  const Layer<T>& layer_;
  const int64_t panels_;
  const bool pack_input_, pack_recurrent_;
  Arena<T> arena_;
  T *w_ih_, *w_hh_, *w_hr_;  // [D, panels, I or P, G*units], [D, panels, H, kPanel]
  T* bias_;                  // [D, panels, 2, G*units]
  T* h_;                     // [D, 2, N, P]: read from one, written to the other
  T* c_;                     // [D, N, H]
  T* unprojected_;           // [D, N, H], null without a projection
  T* gates_;                 // for each thread
  int64_t gates_size_;
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
