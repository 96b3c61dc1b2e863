// The backward pass of one layer, for any cell: the scan in reverse, which leaves the gradient of every gate in one
// matrix, then the products of that matrix with x, h and the weights.
#pragma once

#include "cells/all.h"
#include "cpu/kernels/scan.h"

namespace rnnkit::RNNKIT_CAPABILITY {

template <class Cell, class T>
class Backward {
  static_assert(kFits<Cell>);

 public:
  Backward(const Layer<T>& layer, T* scratch)
      : layer_(layer),
        projects_(layer.direction[0].w_hr != nullptr),
        pack_recurrent_(layer.steps * ((layer.batch + kDotRows - 1) / kDotRows) > kFewSteps ||
                        layer.projected % kLanes<T> != 0),
        pack_input_((layer.rows() + kDotRows - 1) / kDotRows > kFewSteps || layer.input % kLanes<T> != 0),
        arena_(scratch) {
    const int64_t D = layer.directions, N = layer.batch, H = layer.hidden, P = layer.projected, R = layer.rows();
    grads_ = arena_.take(D * R * Cell::grads * H);
    grad_h_ = arena_.take(D * N * P);
    grad_c_ = arena_.take(D * (Cell::states - 1) * N * H);
    w_hh_ = arena_.take(pack_recurrent_ ? D * Cell::gates * H * round_up(P, kPanel) : 0);
    w_hr_ = arena_.take(projects_ ? D * P * round_up(H, kPanel) : 0);
    w_ih_ =
        arena_.take(pack_input_ && layer.grad_x != nullptr ? D * Cell::gates * H * round_up(layer.input, kPanel) : 0);
    grad_projected_ = arena_.take(projects_ ? D * R * P : 0);
    unprojected_ = arena_.take(projects_ ? D * R * H : 0);
    product_size_ = kDepth * (kProductRows + round_up(most(layer.input, most(P, H)), kPanel));
    products_ = arena_.take(layer.threads * product_size_);
  }

  int64_t scratch() const { return arena_.used(); }

  void run() {
    parallel(layer_.threads, [&](int thread, int threads, Barrier& all) {
      const Split split(layer_, Cell::gates, threads);
      prepare(thread, threads);
      all.wait();
      for_each_share(layer_, split, thread, threads, all,
                     [&](int64_t d, Range rows, int64_t member, int64_t members, Barrier& meet) {
                       scan(Rows<T>{layer_, d, rows}, member, members, meet);
                     });
      all.wait();
      input_gradient(thread, threads);
      weight_gradients(thread, threads);
    });
  }

 private:
  static constexpr int64_t kProductRows = 96;  // rows of A and depth of a block of the weight gradients' products
  static constexpr int64_t kDepth = 256;

  // A weight matrix [K, columns], row-major, in panels of kPanel columns; or as it lies, if it is not packed.
  struct Panels {
    const T* b;
    int64_t ld;
  };
  static Panels panel(const T* packed, const T* w, int64_t K, int64_t columns, int64_t d, int64_t first) {
    if (packed == nullptr) return {w + first, columns};
    return {packed + d * K * round_up(columns, kPanel) + first / kPanel * K * kPanel + first % kPanel, kPanel};
  }

  void pack(T* packed, const T* w, int64_t K, int64_t columns, int64_t d, int thread, int threads) {
    if (packed == nullptr) return;
    const Range panels = share((columns + kPanel - 1) / kPanel, thread, threads);
    for (int64_t p = panels.begin; p < panels.end; ++p)
      pack_rows(
          K, least(kPanel, columns - p * kPanel), [&](int64_t k) { return w + k * columns + p * kPanel; },
          packed + d * K * round_up(columns, kPanel) + p * K * kPanel, kPanel);
  }

  void prepare(int thread, int threads) {
    const int64_t H = layer_.hidden, P = layer_.projected;
    for (int64_t d = 0; d < layer_.directions; ++d) {
      const Direction<T>& weights = layer_.direction[d];
      pack(w_hh_, weights.w_hh, Cell::gates * H, P, d, thread, threads);
      pack(w_ih_, weights.w_ih, Cell::gates * H, layer_.input, d, thread, threads);
      pack(w_hr_, weights.w_hr, P, H, d, thread, threads);
    }
    start(grad_h_, layer_.grad_final[0], P, thread, threads);
    start(grad_c_, layer_.grad_final[1], H, thread, threads);
  }

  void start(T* carried, const T* grad_final, int64_t width, int thread, int threads) {
    if (carried == nullptr) return;
    const Range own = share(layer_.directions * layer_.batch * width, thread, threads, 64);
    if (grad_final != nullptr)
      std::memcpy(carried + own.begin, grad_final + own.begin, own.size() * sizeof(T));
    else
      std::memset(carried + own.begin, 0, own.size() * sizeof(T));
  }

  // Columns of h in one product: narrow enough that each member of a team has some.
  int64_t panel_width(int64_t columns, int64_t members) const {
    int64_t width = kPanel;
    while (width > 16 && (columns + width - 1) / width % members != 0) width /= 2;
    return width;
  }

  void scan(const Rows<T>& rows, int64_t member, int64_t members, Barrier& meet) {
    const int64_t H = layer_.hidden, P = layer_.projected;
    const int64_t width = panel_width(P, members), cell_width = panel_width(H, members);
    const Range own = share(P, member, members, width), own_units = share(H, member, members, cell_width);
    for (int64_t s = layer_.steps - 1; s >= -1; --s) {
      if (s < 0 && layer_.grad_initial[0] == nullptr && layer_.grad_initial[1] == nullptr) break;
      for (int64_t first = own.begin; first < own.end; first += width)
        step(rows, s, first, least(width, own.end - first));
      if (projects_) {
        meet.wait();
        for (int64_t first = own_units.begin; first < own_units.end; first += cell_width)
          step_behind_projection(rows, s, first, least(cell_width, own_units.end - first));
      }
      meet.wait();
    }
  }

  T* gate_grads(int64_t d, int64_t row) const {
    return grads_ + (d * layer_.rows() + row) * Cell::grads * layer_.hidden;
  }

  // The gradient of h after visit s, columns first to first + width: from the output, from visit s + 1 through the
  // recurrent weights, and what was carried. Then the cell; or, for rows that begin after visit s, the result.
  void step(const Rows<T>& rows, int64_t s, int64_t first, int64_t width) {
    const int64_t d = rows.direction, H = layer_.hidden, P = layer_.projected;
    const int64_t alive = rows.alive(s), alive_after = rows.alive(s + 1);
    const int64_t K = Cell::gates * H, lda = Cell::grads * H;
    const Panels w = panel(w_hh_, layer_.direction[d].w_hh, K, P, d, first);
    alignas(64) T recurrent[kRowBlock * kPanel];
    for (int64_t m = 0; m < most(alive, alive_after); m += kRowBlock) {
      const int64_t count = least(kRowBlock, most(alive, alive_after) - m);
      const int64_t from_after = most(0, least(count, alive_after - m));
      if (from_after > 0)
        gemm<T>(from_after, round_up(width, kLanes<T>), K, {gate_grads(d, rows.first(s + 1) + m), lda, 1}, w.b, w.ld,
                recurrent, kPanel, false);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t n = rows.range.begin + m + i;
        const bool is_alive = m + i < alive;
        const int64_t row = is_alive ? rows.first(s) + m + i : 0;
        for (int64_t u = 0; u < width; u += kLanes<T>) {
          const int64_t unit = first + u, lanes = least(kLanes<T>, width - u);
          const int64_t state = (d * layer_.batch + n) * P + unit;
          Vector<T> grad = load(grad_h_ + state, lanes);
          if (i < from_after) grad += load(recurrent + i * kPanel + u, lanes);
          if (!is_alive) {
            finish(state, unit, d, n, grad, lanes);
            continue;
          }
          if (layer_.grad_y != nullptr) grad += load(layer_.grad_y + (row * layer_.directions + d) * P + unit, lanes);
          if (projects_) {
            store(grad_projected_ + (d * layer_.rows() + row) * P + unit, grad, lanes);
            store(grad_h_ + state, Vector<T>{}, lanes);
          } else {
            store(grad_h_ + state, cell(rows, s, row, n, unit, lanes, grad), lanes);
          }
        }
      }
    }
  }

  // A row's gradients of its initial states.
  void finish(int64_t state, int64_t unit, int64_t d, int64_t n, Vector<T> grad_h, int64_t lanes) {
    if (layer_.grad_initial[0] != nullptr) store(layer_.grad_initial[0] + state, grad_h, lanes);
    if (!projects_) finish_c(d, n, unit, lanes);
  }
  void finish_c(int64_t d, int64_t n, int64_t unit, int64_t lanes) {
    if (layer_.grad_initial[1] == nullptr) return;
    const int64_t state = (d * layer_.batch + n) * layer_.hidden + unit;
    store(layer_.grad_initial[1] + state, load(grad_c_ + state, lanes), lanes);
  }

  // The same where h was projected: the gradient of h before the projection, for units first to first + width.
  void step_behind_projection(const Rows<T>& rows, int64_t s, int64_t first, int64_t width) {
    const int64_t d = rows.direction, H = layer_.hidden, P = layer_.projected;
    const int64_t alive = rows.alive(s), alive_after = rows.alive(s + 1);
    const Panels w = panel(w_hr_, nullptr, P, H, d, first);
    alignas(64) T grads[kRowBlock * kPanel];
    for (int64_t m = 0; m < alive; m += kRowBlock) {
      const int64_t count = least(kRowBlock, alive - m), row = d * layer_.rows() + rows.first(s) + m;
      gemm<T>(count, round_up(width, kLanes<T>), P, {grad_projected_ + row * P, P, 1}, w.b, w.ld, grads, kPanel, false);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t u = 0; u < width; u += kLanes<T>)
          cell(rows, s, rows.first(s) + m + i, rows.range.begin + m + i, first + u, least(kLanes<T>, width - u),
               load(grads + i * kPanel + u));
    }
    for (int64_t m = alive; m < alive_after; ++m)
      for (int64_t u = 0; u < width; u += kLanes<T>)
        finish_c(d, rows.range.begin + m, first + u, least(kLanes<T>, width - u));
  }

  // The cell's backward for some units of a row; returns what it carries to the previous h besides the gates.
  RNNKIT_INLINE Vector<T> cell(const Rows<T>& rows, int64_t s, int64_t row, int64_t n, int64_t unit, int64_t lanes,
                               Vector<T> grad_h) {
    using V = Vector<T>;
    const int64_t d = rows.direction, H = layer_.hidden, state = (d * layer_.batch + n) * H + unit;
    V save[Cell::saved], grad_state[Cell::states] = {grad_h}, grad[Cell::grads], previous_h{};
    const T* saved = layer_.reserve + (d * layer_.rows() + row) * Cell::saved * H + unit;
#pragma GCC unroll 8
    for (int64_t k = 0; k < Cell::saved; ++k) save[k] = load(saved + k * H, lanes);
    if constexpr (Cell::uses_previous_h) {
      const T* h = rows.previous_h(rows.step(s), n);
      if (h != nullptr) previous_h = load(h + unit, lanes);
    }
    if constexpr (Cell::states > 1) grad_state[1] = load(grad_c_ + state, lanes);
    Cell::backward(save, previous_h, grad_state, grad);
    T* grads = gate_grads(d, row) + unit;
#pragma GCC unroll 8
    for (int64_t k = 0; k < Cell::grads; ++k) store(grads + k * H, grad[k], lanes);
    if constexpr (Cell::states > 1) store(grad_c_ + state, grad_state[1], lanes);
    if (projects_) store(unprojected_ + (d * layer_.rows() + row) * H + unit, Cell::output(save), lanes);
    return grad_state[0];
  }

  // Calls run(first gate, number of gates, first column in grads_ / H) for gates whose input gradients lie together.
  template <class Run>
  static void for_input_gates(const Run& run) {
    for (int64_t g = 0; g < Cell::gates;) {
      int64_t end = g + 1;
      while (end < Cell::gates && Cell::input_grad[end] == Cell::input_grad[end - 1] + 1) ++end;
      run(g, end - g, Cell::input_grad[g]);
      g = end;
    }
  }

  // grad_x = the sum over directions of grads W_ih.
  void input_gradient(int thread, int threads) {
    if (layer_.grad_x == nullptr) return;
    const int64_t H = layer_.hidden, I = layer_.input, K = Cell::gates * H, lda = Cell::grads * H;
    const int64_t panels = (I + kPanel - 1) / kPanel;
    const Range tasks = share((layer_.rows() + kProductRows - 1) / kProductRows * panels, thread, threads);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t row = task / panels * kProductRows, first = task % panels * kPanel;
      bool add = false;
      for (int64_t d = 0; d < layer_.directions; ++d)
        for_input_gates([&](int64_t gate, int64_t gates, int64_t column) {
          const Panels w = panel(w_ih_, layer_.direction[d].w_ih, K, I, d, first);
          gemm<T>(least(kProductRows, layer_.rows() - row), least(kPanel, I - first), gates * H,
                  {gate_grads(d, row) + column * H, lda, 1}, w.b + gate * H * w.ld, w.ld,
                  layer_.grad_x + row * I + first, I, add);
          add = true;
        });
    }
  }

  void weight_gradients(int thread, int threads) {
    const int64_t H = layer_.hidden, P = layer_.projected, R = layer_.rows(), ld = Cell::grads * H;
    for (int64_t d = 0; d < layer_.directions; ++d) {
      const Direction<T>& weights = layer_.direction[d];
      const RowsOf x{layer_.x, layer_.input};
      for_input_gates([&](int64_t gate, int64_t gates, int64_t column) {
        product(gate_grads(d, 0) + column * H, ld, gates * H, x, layer_.input,
                at(weights.grad_w_ih, gate * H * layer_.input), at(weights.grad_b_ih, gate * H), thread, threads);
      });
      product(gate_grads(d, 0), ld, Cell::gates * H, PreviousH{{layer_, d, {0, layer_.batch}}}, P, weights.grad_w_hh,
              weights.grad_b_hh, thread, threads);
      if (projects_)
        product(at(grad_projected_, d * R * P), P, P, RowsOf{unprojected_ + d * R * H, H}, H, weights.grad_w_hr,
                nullptr, thread, threads);
    }
  }

  static T* at(T* base, int64_t offset) { return base == nullptr ? nullptr : base + offset; }

  // B operands of the weight gradients: row(r), null for zeros, and the distance between rows r to r + depth, or 0 if
  // they do not lie evenly.
  struct RowsOf {
    const T* base;
    int64_t width;
    const T* row(int64_t r) { return base + r * width; }
    int64_t distance(int64_t /*r*/, int64_t /*depth*/) const { return width; }
  };
  struct PreviousH {
    Rows<T> rows;
    int64_t t = 0;
    const T* row(int64_t r) {
      while (r < rows.layer.offsets[t]) --t;
      while (r >= rows.layer.offsets[t + 1]) ++t;
      return rows.previous_h(t, r - rows.layer.offsets[t]);
    }
    int64_t distance(int64_t r, int64_t depth) const {
      const int64_t N = rows.layer.batch, R = rows.layer.rows();
      const bool dense = R == rows.layer.steps * N, inside = rows.direction == 0 ? r >= N : r + depth <= R - N;
      return dense && inside ? rows.layer.directions * rows.layer.projected : 0;
    }
  };

  // Rows of this distance are read as they lie: a block of them is within reach of the first-level TLB.
  static bool is_near(int64_t distance) { return distance > 0 && distance * int64_t(sizeof(T)) <= 1024; }

  // c[M, N] = the sum over all rows r of a(r, m) b(r)[n], with a(r, m) = a[r * lda + m]; sums[m] = that of a(r, m).
  // Each thread has some of the M. Of rows that are far apart, blocks of kDepth are copied, so that the micro-kernel
  // walks packed memory.
  template <class B>
  void product(const T* a, int64_t lda, int64_t M, B b, int64_t N, T* c, T* sums, int thread, int threads) {
    const Range own = share(M, thread, threads, 16);
    if (own.size() == 0 || (c == nullptr && sums == nullptr)) return;
    if (c != nullptr && layer_.rows() == 0) std::memset(c + own.begin * N, 0, own.size() * N * sizeof(T));
    if (sums != nullptr) std::memset(sums + own.begin, 0, own.size() * sizeof(T));
    T* space = products_ + thread * product_size_;
    for (int64_t r = 0; r < layer_.rows(); r += kDepth) {
      const int64_t depth = least(kDepth, layer_.rows() - r);
      Panels of_b{b.row(r), b.distance(r, depth)};
      const bool b_lies_well = is_near(of_b.ld) && N % kLanes<T> == 0;
      for (int64_t n = 0; c != nullptr && !b_lies_well && n < N; n += kPanel)
        pack_rows(
            depth, least(kPanel, N - n), [&](int64_t k) { return offset(b.row(r + k), n); }, space + n * depth, kPanel);
      for (int64_t m = own.begin; m < own.end; m += kProductRows) {
        const int64_t rows = least(kProductRows, own.end - m);
        MatrixA<T> of_a{a + r * lda + m, 1, lda};
        if (!is_near(lda)) {
          T* packed = space + product_size_ - kProductRows * kDepth;
          pack_rows(depth, rows, [&](int64_t k) { return of_a.a + k * lda; }, packed, kProductRows);
          of_a = {packed, 1, kProductRows};
        }
        if (sums != nullptr) add_rows(of_a, depth, rows, sums + m);
        for (int64_t n = 0; c != nullptr && n < N; n += kPanel) {
          const Panels w = b_lies_well ? Panels{of_b.b + n, of_b.ld} : Panels{space + n * depth, kPanel};
          gemm<T>(rows, least(kPanel, N - n), depth, of_a, w.b, w.ld, c + m * N + n, N, r > 0);
        }
      }
    }
  }

  static const T* offset(const T* row, int64_t n) { return row == nullptr ? nullptr : row + n; }

  // sums[m] += the sum of a's column m; in four parts and apart from earlier blocks, which keeps rounding errors small.
  static void add_rows(MatrixA<T> a, int64_t depth, int64_t rows, T* sums) {
    for (int64_t m = 0; m < rows; m += kLanes<T>) {
      const int64_t lanes = least(kLanes<T>, rows - m);
      Vector<T> part[4] = {};
      for (int64_t k = 0; k < depth; k += 4)
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i)
          if (k + i < depth) part[i] += load(a.a + (k + i) * a.column + m, lanes);
      store(sums + m, load(sums + m, lanes) + ((part[0] + part[1]) + (part[2] + part[3])), lanes);
    }
  }

  const Layer<T>& layer_;
  const bool projects_, pack_recurrent_, pack_input_;
  Arena<T> arena_;
  T* grads_;                 // [D, rows, Cell::grads, H]
  T *grad_h_, *grad_c_;      // [D, N, P], [D, N, H]: carried from step to step
  T *w_hh_, *w_hr_, *w_ih_;  // [D, panels, K, kPanel], K = G*H, P, G*H
  T* grad_projected_;        // [D, rows, P], with a projection
  T* unprojected_;           // [D, rows, H], with a projection: h before it
  T* products_;              // for each thread
  int64_t product_size_;
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
