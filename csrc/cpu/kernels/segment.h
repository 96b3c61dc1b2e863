// The backward pass goes through a layer by segments: runs of time steps, so short that what is computed of their rows
// is still in cache for the products that follow.
#pragma once

#include "cpu/kernels/scan.h"

namespace rnnkit::RNNKIT_CAPABILITY {

constexpr int64_t kSegmentRows = 192;  // at most, in each direction; one step in any case

// Steps begin to end - 1 of the forward scan, and their rows of x and y in each direction.
struct Segment {
  int64_t begin, end, index;
  PerDirection<Range> rows;
};

// All segments of a layer, the last steps first.
template <class S>
std::vector<Segment> segments_of(const Layer<S>& layer) {
  std::vector<Segment> segments;
  const auto rows_of = [&](int64_t begin, int64_t end, int64_t d) -> Range {
    if (layer.reverses(d)) return {layer.begin(layer.steps - end), layer.begin(layer.steps - begin)};
    return {layer.begin(begin), layer.begin(end)};
  };
  for (int64_t end = layer.steps; end > 0; end = segments.back().begin) {
    int64_t begin = end - 1;
    while (begin > 0 && rows_of(begin - 1, end, 0).size() <= kSegmentRows &&
           rows_of(begin - 1, end, layer.directions - 1).size() <= kSegmentRows)
      --begin;
    const auto index = static_cast<int64_t>(segments.size());
    segments.push_back({begin, end, index, PerDirection<Range>(layer.directions)});
    for (int64_t d = 0; d < layer.directions; ++d) segments.back().rows[d] = rows_of(begin, end, d);
  }
  return segments;
}

// Values of a segment's rows, `width` of each: [segments, D, rows, width]. `segments` is the number of buffers, 1 or 2,
// which consecutive segments use in turn. With two, a thread can begin a segment while others still multiply the one
// before, and the first recurrent product of a segment still finds the gate gradients of the step after it.
template <class E>
class SegmentValues {
 public:
  SegmentValues(Arena& arena, int64_t segments, int64_t directions, int64_t max_rows, int64_t width)
      : segments_(segments),
        directions_(directions),
        max_rows_(max_rows),
        width_(width),
        values_(arena.take<E>(segments * directions * max_rows * width)) {}

  // `row`: its index in x and y.
  E* at(const Segment& segment, int64_t d, int64_t row) const {
    return begin(segment, d) + (row - segment.rows[d].begin) * width_;
  }
  E* begin(const Segment& segment, int64_t d) const {
    return values_ + (segment.index % segments_ * directions_ + d) * max_rows_ * width_;
  }
  int64_t width() const { return width_; }

 private:
  int64_t segments_, directions_, max_rows_, width_;
  E* values_;
};

// h before each step of a segment's rows, which is their recurrent operand if there is no mask. row(r): the address of
// h of row r of the segment. stride(r, n): the distance from row to row among rows r to r + n - 1, or 0 if it varies.
template <class S>
class RecurrentOperands {
 public:
  RecurrentOperands(const Layer<S>& layer, const Segment& segment, int64_t d, const Beginnings<S>& beginnings)
      : rows_{layer, d, {0, layer.batch}},
        first_(segment.rows[d].begin),
        t_(layer.reverses(d) ? layer.steps - segment.end : segment.begin),
        beginnings_(beginnings) {}

  const S* row(int64_t r) {
    const int64_t n = batch_row(r), s = rows_.time(t_);
    return rows_.h_before(s, n, rows_.before(s), beginnings_);
  }

  // Row r's place in the batch. Begins to look for the row's step at the one found before.
  int64_t batch_row(int64_t r) {
    r += first_;
    while (r < rows_.layer.begin(t_)) --t_;
    while (r >= rows_.layer.begin(t_ + 1)) ++t_;
    return r - rows_.layer.begin(t_);
  }

  // The operands of rows that continue and are not put back are in y, at even distances if all steps have the same
  // rows.
  int64_t stride(int64_t r, int64_t n) const {
    const int64_t N = rows_.layer.batch, R = rows_.layer.rows();
    const bool dense = R == rows_.layer.steps * N;
    const bool reverses = rows_.layer.reverses(rows_.direction);
    const bool continue_all = reverses ? first_ + r + n <= R - N : first_ + r >= N;
    if (!dense || !continue_all) return 0;
    const bool* resets = at(rows_.layer.reset, first_ + r + (reverses ? N : 0));
    if (resets != nullptr && std::memchr(resets, 1, n) != nullptr) return 0;
    return rows_.layer.directions * rows_.layer.projected;
  }

 private:
  ActiveRows<S> rows_;
  int64_t first_, t_;
  const Beginnings<S> beginnings_;
};

// Some values of a segment's rows that lie together, as RecurrentOperands gives them.
template <class S>
struct EvenRows {
  const S* base;
  int64_t width;
  const S* row(int64_t r) const { return base + r * width; }
  int64_t stride(int64_t /*r*/, int64_t /*n*/) const { return width; }
};

// The recurrent operands of a segment's rows where Layer::operand_mask makes them of h; without one there are none.
template <class S>
class MaskedOperands {
  using T = Sum<S>;

 public:
  MaskedOperands(const Layer<S>& layer, int64_t max_rows, const Beginnings<S>& beginnings, Arena& arena)
      : layer_(layer),
        beginnings_(beginnings),
        values_(arena, 2, layer.operand_mask != nullptr ? layer.directions : 0, max_rows, layer.projected) {}

  bool there() const { return layer_.operand_mask != nullptr; }

  // This thread's part. All threads wait before they are read.
  void fill(const Segment& segment, int thread, int threads) const {
    if (!there()) return;
    const int64_t P = layer_.projected;
    for (int64_t d = 0; d < layer_.directions; ++d) {
      const Range own = range_of(segment.rows[d].size(), thread, threads);
      RecurrentOperands<S> h(layer_, segment, d, beginnings_);
      for (int64_t r = own.begin; r < own.end; ++r) {
        const S* row = h.row(r);
        const T* mask = layer_.operand_mask + (d * layer_.batch + h.batch_row(r)) * P;
        masked<T>(row, mask, P, values_.begin(segment, d) + r * P);
      }
    }
  }

  EvenRows<S> of(const Segment& segment, int64_t d) const { return {values_.begin(segment, d), layer_.projected}; }

 private:
  const Layer<S>& layer_;
  const Beginnings<S> beginnings_;
  SegmentValues<S> values_;
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
