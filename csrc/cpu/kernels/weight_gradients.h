// The gradients of weights and biases: sums over the rows of all segments, to which each segment's are added while they
// are in cache.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cpu/kernels/layer_norm.h"

namespace rnnkit::RNNKIT_CAPABILITY {

// What the reverse scan leaves of a segment's rows.
template <class S>
struct SegmentGrads {
  SegmentValues<S> gates;        // [columns, H], see RegisteredCell: gradients, and the second operand
  SegmentValues<S> projected;    // [P]: the gradient of the projected h; empty without a projection
  SegmentValues<S> unprojected;  // [H]: h before its projection, a value; empty without a projection
};

template <class Cell, class S>
class WeightGradients {
  using T = Sum<S>;

 public:
  WeightGradients(const Layer<S>& layer, bool projects, int64_t max_rows, const SegmentGrads<S>& grads,
                  const NormalizedGrads<Cell, S>& normalized, const Beginnings<S>& beginnings,
                  const MaskedOperands<S>& masked, Arena& arena)
      : layer_(layer),
        projects_(projects),
        grads_(grads),
        normalized_(normalized),
        beginnings_(beginnings),
        masked_(masked),
        packed_x_(layer.directions),
        packed_h_(layer.directions),
        packed_operand_(layer.directions),
        packed_unprojected_(layer.directions) {
    for (int64_t d = 0; d < layer.directions; ++d) {
      packed_x_[d] = arena.take<S>(layer.multiplies_input ? max_rows * round_up(layer.input, kPanel) : 0);
      packed_h_[d] = arena.take<S>(max_rows * round_up(layer.projected, kPanel));
      packed_operand_[d] = arena.take<S>(shape().late > 0 ? max_rows * round_up(layer.hidden, kPanel) : 0);
      packed_unprojected_[d] = arena.take<S>(projects ? max_rows * round_up(layer.hidden, kPanel) : 0);
    }
    copies_ = arena.take<S>(layer.threads * kSegmentRows * kTileRows);
  }

  // Packs what a segment's gradients are multiplied with, this thread's part. All threads wait before add().
  void pack(const Segment& segment, int thread, int threads) const {
    for (int64_t d = 0; d < layer_.directions; ++d) {
      const Direction<S>& weights = layer_.direction[d];
      const int64_t rows = segment.rows[d].size();
      if (weights.grad_w_ih != nullptr) pack(inputs(segment, d), rows, layer_.input, packed_x_[d], thread, threads);
      if (weights.grad_w_hh != nullptr && shape().early > 0)
        with_operands(segment, d, [&](const auto& operands) {
          pack(operands, rows, layer_.projected, packed_h_[d], thread, threads);
        });
      if (weights.grad_w_hh != nullptr && shape().late > 0)
        pack(second_operands(segment, d), rows, layer_.hidden, packed_operand_[d], thread, threads);
      if (weights.grad_w_hr != nullptr)
        pack(unprojected(segment, d), rows, layer_.hidden, packed_unprojected_[d], thread, threads);
    }
  }

  // Adds a segment's part to direction d's gradients, the first segment's to nothing.
  void add(const Segment& segment, int64_t d, int thread, int threads) const {
    const int64_t H = layer_.hidden, P = layer_.projected, I = layer_.input;
    const Direction<S>& weights = layer_.direction[d];
    const S* gates = grads_.gates.begin(segment, d);
    const Sums of{segment.index > 0, segment.rows[d].size(), grads_.gates.width(), thread, threads};
    const auto with_x = [&](int64_t gate) {
      return Product{inputs(segment, d), packed_x_[d], I, at(weights.grad_w_ih, gate * H * I),
                     at(weights.grad_b_ih, gate * H)};
    };
    with_operands(segment, d, [&](const auto& operands) {
      const auto with = [&](const auto& of_product, const S* packed, int64_t gate) {
        return Product{of_product, packed, P, at(weights.grad_w_hh, gate * H * P), at(weights.grad_b_hh, gate * H)};
      };
      // Calls run with what the recurrent part of a gate is made of.
      const auto with_h = [&](int64_t gate, const auto& run) {
        if (gate < shape().early) return run(with(operands, packed_h_[d], gate));
        if constexpr (kIsRegistered<Cell>) run(with(second_operands(segment, d), packed_operand_[d], gate));
      };
      if (normalized_.there()) {  // normalized_ sums the gradients of biases itself
        const Sums all{of.add, of.rows, shape().gates * H, thread, threads};
        const auto of_x = Product{inputs(segment, d), packed_x_[d], I, weights.grad_w_ih, nullptr};
        const auto of_h = Product{operands, packed_h_[d], P, weights.grad_w_hh, nullptr};
        products(all, normalized_.input.begin(segment, d), shape().gates * H, of_x);
        products(all, normalized_.recurrent.begin(segment, d), shape().gates * H, of_h);
        return;
      }
      // Gates whose two parts have the same gradient go together: it is then copied and summed once.
      const int64_t both = min_of(shape().gates, shape().recurrent);
      for (int64_t g = 0; g < max_of(shape().gates, shape().recurrent);) {
        int64_t end = g;
        const int64_t alike = g < shape().early ? min_of(both, shape().early) : both;  // made of the same operand
        while (end < alike && shape().input_grad[end] == end) ++end;
        if (end > g) {
          with_h(g, [&](const auto& of_h) { products(of, gates + g * H, (end - g) * H, with_x(g), of_h); });
        } else {
          end = g + 1;
          if (g < shape().gates) products(of, gates + shape().input_grad[g] * H, H, with_x(g));
          if (g < shape().recurrent) with_h(g, [&](const auto& of_h) { products(of, gates + g * H, H, of_h); });
        }
        g = end;
      }
    });
    if (shape().parameters > 0)
      products(of, gates + shape().grads * H, shape().parameters * H,
               Product{inputs(segment, d), packed_x_[d], I, static_cast<T*>(nullptr), weights.grad_unit});
    if (projects_)
      products({of.add, of.rows, P, thread, threads}, grads_.projected.begin(segment, d), P,
               Product{unprojected(segment, d), packed_unprojected_[d], H, weights.grad_w_hr, nullptr});
  }

 private:
  static constexpr int64_t kPair = Operand<S>::pair;
  static constexpr int64_t kTileRows = 96;  // rows of a weight's gradient that are worked on at once

  // The right-hand operands of products over a segment's rows: EvenRows, or RecurrentOperands.
  EvenRows<S> inputs(const Segment& segment, int64_t d) const {
    return {layer_.x + segment.rows[d].begin * layer_.input, layer_.input};
  }
  EvenRows<S> second_operands(const Segment& segment, int64_t d) const {
    return {grads_.gates.begin(segment, d) + (shape().columns - 1) * layer_.hidden, grads_.gates.width()};
  }
  EvenRows<S> unprojected(const Segment& segment, int64_t d) const {
    return {grads_.unprojected.begin(segment, d), layer_.hidden};
  }
  template <class Body>
  void with_operands(const Segment& segment, int64_t d, const Body& body) const {
    if (masked_.there())
      body(masked_.of(segment, d));
    else
      body(RecurrentOperands<S>(layer_, segment, d, beginnings_));
  }

  // Rows so near to each other are read unpacked: a block of them is within reach of the first-level TLB.
  static bool is_near(int64_t stride) { return kPair == 1 && stride > 0 && stride * int64_t(sizeof(S)) <= 1024; }
  template <class B>
  static bool can_stay(const B& b, int64_t r, int64_t depth, int64_t columns) {
    return is_near(b.stride(r, depth)) && columns % kLanes<T> == 0;
  }

  // Packs b [rows, columns] in blocks of kSegmentRows rows, except for blocks that are read unpacked.
  template <class B>
  static void pack(B b, int64_t rows, int64_t columns, S* to, int thread, int threads) {
    const int64_t width = round_up(columns, kPanel), panels = width / kPanel;
    const Range tasks = range_of((rows + kSegmentRows - 1) / kSegmentRows * panels, thread, threads);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t r = task / panels * kSegmentRows, n = task % panels * kPanel;
      const int64_t depth = min_of(kSegmentRows, rows - r), K = round_up(depth, kPair);
      if (can_stay(b, r, depth, columns)) continue;
      pack_rows<S>(
          depth, min_of(kPanel, columns - n), [&](int64_t k) { return b.row(r + k) + n; }, to + r * width + n * K,
          kPanel, 0);
    }
  }

  // c [M, columns] = AᵀB and sums [M] = the column sums of A, over the rows of a segment; null: not needed. A [rows, M]
  // is the gradient of some gates (M = gates * H) or of the projected h (M = P). B is `b`, and `packed` what pack()
  // made of it.
  template <class B>
  struct Product {
    B b;
    const S* packed;
    int64_t columns;
    T *c, *sums;
  };

  // What the products over one segment have in common. add: whether c and sums are added to. rows: of the segment. lda:
  // elements from row to row of A.
  struct Sums {
    bool add;
    int64_t rows, lda;
    int thread, threads;
  };

  // Computes the products that share A, each thread some rows of every c. Rows of A that are far apart are copied
  // first, a block at a time, so that the micro-kernel walks packed memory.
  template <class... Products>
  void products(const Sums& of, const S* a, int64_t M, Products... each) const {
    const Range own = range_of(M, of.thread, of.threads, 16);
    if (own.size() == 0 || ((each.c == nullptr && each.sums == nullptr) && ...)) return;
    for (T* sums : {each.sums...})
      if (sums != nullptr && !of.add) std::memset(sums + own.begin, 0, own.size() * sizeof(T));
    S* copy = copies_ + of.thread * kSegmentRows * kTileRows;
    for (int64_t r = 0; r < of.rows; r += kSegmentRows) {
      const int64_t depth = min_of(kSegmentRows, of.rows - r);
      for (int64_t m = own.begin; m < own.end; m += kTileRows) {
        const int64_t rows = min_of(kTileRows, own.end - m);
        MatrixA<S, true> of_a{a + r * of.lda + m, of.lda};
        if (!is_near(of.lda)) {
          copy_rows<S>(depth, rows, [&](int64_t k) { return a + (r + k) * of.lda + m; }, copy, kTileRows);
          of_a = {copy, kTileRows * kPair};
        }
        add_rows(of_a, round_up(depth, kPair) / kPair, rows, {at(each.sums, m)...});
        (multiply(of_a, rows, r, depth, m, of.add || r > 0, each), ...);
      }
    }
  }

  // One block of a product: rows m to m + rows - 1 of c, over the segment's rows r to r + depth - 1.
  template <class B>
  static void multiply(MatrixA<S, true> a, int64_t rows, int64_t r, int64_t depth, int64_t m, bool add,
                       Product<B>& product) {
    const int64_t N = product.columns, K = round_up(depth, kPair), stride = product.b.stride(r, depth);
    if (product.c == nullptr) return;
    const S* unpacked = can_stay(product.b, r, depth, N) ? product.b.row(r) : nullptr;
    const S* packed = product.packed + r * round_up(N, kPanel);
    for (int64_t n = 0; n < N; n += kPanel) {
      const MatrixB<S> b = unpacked != nullptr ? MatrixB<S>::row_major(unpacked + n, stride)
                                               : MatrixB<S>::packed(packed + n * K, K, kPanel);
      gemm<S>(rows, min_of(kPanel, N - n), K, a, b, product.c + m * N + n, N, add);
    }
  }

  // Adds the sums of A's first `rows` columns to each of these bias gradients; null: skipped. `a` is Aᵀ, so A's columns
  // are its rows; `pairs`: A's rows, in pairs. Four sums side by side, apart from those of earlier blocks, keep
  // rounding errors small.
  static void add_rows(MatrixA<S, true> a, int64_t pairs, int64_t rows, std::initializer_list<T*> each) {
    if (std::all_of(each.begin(), each.end(), [](const T* sums) { return sums == nullptr; })) return;
    for (int64_t m = 0; m < rows; m += kLanes<T>) {
      const int64_t lanes = min_of(kLanes<T>, rows - m);
      Vector<T> part[4] = {};
      for (int64_t q = 0; q < pairs; q += 4)
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i)
          if (q + i < pairs)
            part[i] +=
                Operand<S>::sum_pairs(Operand<S>::load_pairs(a.a + m * kPair + (q + i) * a.column(), lanes * kPair));
      for (T* sums : each)
        if (sums != nullptr)
          store(sums + m, load(sums + m, lanes) + ((part[0] + part[1]) + (part[2] + part[3])), lanes);
    }
  }

  const auto& shape() const { return shape_of<Cell>(layer_); }

  const Layer<S>& layer_;
  const bool projects_;
  const SegmentGrads<S>& grads_;
  const NormalizedGrads<Cell, S>& normalized_;
  const Beginnings<S> beginnings_;
  const MaskedOperands<S>& masked_;
  // [rows, columns] of a segment, in panels of kPanel.
  PerDirection<S*> packed_x_, packed_h_, packed_operand_, packed_unprojected_;
  S* copies_;  // for each thread [kSegmentRows, kTileRows]
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
