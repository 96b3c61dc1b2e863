// Layer normalization (Ba, Kiros and Hinton 2016) of a row's values: n = (value - mean) / sqrt(variance + epsilon),
// which a factor multiplies. The products x W_ihᵀ and h W_hhᵀ of a row are normalized over all gates, and a cell's source
// (cells/all.h). Forward.h and recompute.h take from here what a step makes of products; the backward pass is here.
//
// A row is normalized by one thread, so that its sums do not depend on the number of threads: where threads divide the
// units of a product, they meet and then divide the rows.
#pragma once

#include <cmath>

#include "cpu/kernels/segment.h"
#include "cpu/kernels/shape.h"

namespace rnnkit::RNNKIT_CAPABILITY {

template <class V>
RNNKIT_INLINE Element<V> total(V value) {
  Element<V> sum = 0;
  for (int64_t i = 0; i < kLanes<Element<V>>; ++i) sum += value[i];
  return sum;
}

constexpr double kNormEpsilon = 1e-5;  // NORM_EPSILON in rnnkit/specs.py

// A row's mean and 1 / sqrt(variance + epsilon).
template <class T>
struct Moments {
  T mean, rstd;

  RNNKIT_INLINE Vector<T> normalized(Vector<T> value) const { return (value - mean) * rstd; }
};

template <class T>
Moments<T> moments(int64_t size, const T* values) {
  const auto mean_of = [&](const auto& of_value) {
    Vector<T> sums[4] = {};
    for_vectors_in_four<T>(size, [&](int64_t i, auto lanes, int part) RNNKIT_INLINE_LAMBDA {
      sums[part] += first_lanes(of_value(load(values + i, lanes)), lanes);
    });
    return total((sums[0] + sums[1]) + (sums[2] + sums[3])) / size;
  };
  const T mean = mean_of([](Vector<T> value) RNNKIT_INLINE_LAMBDA { return value; });
  const T variance = mean_of([mean](Vector<T> value) RNNKIT_INLINE_LAMBDA { return (value - mean) * (value - mean); });
  return {mean, 1 / std::sqrt(variance + T(kNormEpsilon))};
}

// A row whose products with x and with h, [2, G, H], are normalized.
template <class Cell, class S>
struct NormalizedRow {
  static_assert(!Cell::has_source || Cell::saved == Cell::gates + 1, "the gates and state 1 before the step");
  using T = Sum<S>;

  const T* products;
  const Direction<S>* weights;
  int64_t hidden;
  Moments<T> of_x, of_h;

  NormalizedRow() = default;
  NormalizedRow(const Layer<S>& layer, int64_t d, const T* row)
      : products(row),
        weights(&layer.direction[d]),
        hidden(layer.hidden),
        of_x(moments(Cell::gates * hidden, row)),
        of_h(moments(Cell::gates * hidden, row + Cell::gates * hidden)) {}

  // The input's and the recurrent part of each gate for some units, with factors and biases.
  template <class Count>
  RNNKIT_INLINE void parts(int64_t u, Count lanes, Vector<T>* x, Vector<T>* h) const {
#pragma GCC unroll 4
    for (int64_t g = 0; g < Cell::gates; ++g) {
      const int64_t i = g * hidden + u;
      x[g] = of_x.normalized(load(products + i, lanes)) * load(weights->norms.ih + i, lanes);
      h[g] = of_h.normalized(load(products + Cell::gates * hidden + i, lanes)) * load(weights->norms.hh + i, lanes);
      if (weights->b_ih != nullptr) x[g] += load(weights->b_ih + i, lanes);
      if (weights->b_hh != nullptr) h[g] += load(weights->b_hh + i, lanes);
    }
  }
};

// The gradient of a row's values [parts, size] from that of n times the factor: rstd (g - mean(g) - n mean(g n)), where
// g is the gradient of n. grad(part): where a part's gradient begins.
template <class T, class S, class Grad>
void normalize_backward(Moments<T> of, int64_t parts, int64_t size, const T* values, const T* factor, const Grad& grad,
                        S* to) {
  Vector<T> sums[4] = {}, products[4] = {};
  for (int64_t g = 0; g < parts; ++g) {
    const auto* from = grad(g);
    for_vectors_in_four<T>(size, [&](int64_t i, auto lanes, int part) RNNKIT_INLINE_LAMBDA {
      const Vector<T> of_n = load(from + i, lanes) * load(factor + g * size + i, lanes);
      sums[part] += of_n;
      products[part] += of_n * of.normalized(load(values + g * size + i, lanes));
    });
  }
  const T mean = total((sums[0] + sums[1]) + (sums[2] + sums[3])) / (parts * size);
  const T slope = total((products[0] + products[1]) + (products[2] + products[3])) / (parts * size);
  for (int64_t g = 0; g < parts; ++g) {
    const auto* from = grad(g);
    for_vectors<T>(size, [&](int64_t i, auto lanes) RNNKIT_INLINE_LAMBDA {
      const Vector<T> of_n = load(from + i, lanes) * load(factor + g * size + i, lanes);
      const Vector<T> n = of.normalized(load(values + g * size + i, lanes));
      store(to + g * size + i, of.rstd * (of_n - mean - n * slope), lanes);
    });
  }
}

// The backward pass of a layer's normalizations, a segment at a time.
template <class Cell, class S>
class NormalizedGrads {
  using T = Sum<S>;

 public:
  // The gradients of the products, [G, H], which take the place of the gates' gradients in products over a segment.
  SegmentValues<S> recurrent, input;

  NormalizedGrads(const Layer<S>& layer, int64_t max_rows, Arena& arena)
      : recurrent(arena, 2, directions(layer), max_rows, shape_of<Cell>(layer).gates * layer.hidden),
        input(arena, 1, directions(layer), max_rows, shape_of<Cell>(layer).gates * layer.hidden),
        layer_(layer),
        moments_(arena, 2, directions(layer), max_rows, 1),
        grad_source_(arena, 2, Cell::has_source ? directions(layer) : 0, max_rows, layer.hidden),
        given_(arena.take<T>(directions(layer) * layer.batch * layer.hidden)),
        of_threads_(arena.take<T>(has_norms<Cell>(layer) ? layer.threads * sums_of_unit() * layer.hidden : 0)) {}

  bool there() const { return has_norms<Cell>(layer_); }

  // The gradient of the h that a step gave, [D, N, H], before any row of it is normalized.
  T* given(int64_t d, int64_t n) const { return given_ + (d * layer_.batch + n) * layer_.hidden; }

  // What is normalized of a row, where it was saved or computed again.
  struct Row {
    const T* saved;     // [Cell::saved, H]
    const T* products;  // [2, G, H]
  };

  // Finds the moments of a segment's rows, this thread's part. All threads wait before they are read.
  template <class RowOf>
  void begin(const Segment& segment, int thread, int threads, const RowOf& row_of) const {
    const int64_t H = layer_.hidden, K = shape().gates * H;
    for (int64_t d = 0; d < layer_.directions; ++d) {
      const Range own = range_of(segment.rows[d].size(), thread, threads);
      for (int64_t r = own.begin; r < own.end; ++r) {
        const Row row = row_of(d, segment.rows[d].begin + r);
        OfRow& of = moments_.begin(segment, d)[r];
        of.input = moments(K, row.products);
        of.recurrent = moments(K, row.products + K);
        if constexpr (Cell::has_source) {
          T* source = of_threads_ + thread * sums_of_unit() * H;
          for_vectors<T>(H, [&](int64_t u, auto lanes) { store(source + u, source_of(row.saved, u, lanes), lanes); });
          of.source = moments(H, static_cast<const T*>(source));
        }
      }
    }
  }

  // What a step's backward has to know of a row's normalized source.
  struct Source {
    const T *factor, *bias;  // [H]
    const T* grad;           // [H]: of the normalized source times the factor
    Moments<T> moments;
    T mean, slope;  // of the gradient of the normalized source, see normalize_backward

    template <class Count>
    RNNKIT_INLINE Vector<T> read(Vector<T> source, int64_t u, Count lanes) const {
      return moments.normalized(source) * load(factor + u, lanes) + load(bias + u, lanes);
    }
    // The gradient of the source.
    template <class Count>
    RNNKIT_INLINE Vector<T> passed(Vector<T> source, int64_t u, Count lanes) const {
      const Vector<T> of_n = load(grad + u, lanes) * load(factor + u, lanes);
      return moments.rstd * (of_n - mean - moments.normalized(source) * slope);
    }
  };

  // grad_h(u, lanes): the gradient of the h that the cell gave.
  template <class GradH>
  Source source(const Segment& segment, int64_t d, int64_t row, const T* saved, const GradH& grad_h) const {
    const int64_t H = layer_.hidden;
    const Norms<T>& norms = layer_.direction[d].norms;
    T* grad = grad_source_.at(segment, d, row);
    Source of{norms.c, norms.c_bias, grad, moments_.at(segment, d, row)->source, 0, 0};
    Vector<T> sum{}, product{};
    for_vectors<T>(H, [&](int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
      Vector<T> save[Cell::saved];
      load_saved(saved, u, lanes, save);
      const Vector<T> source = Cell::source(save);
      const Vector<T> of_read = Cell::grad_source(save, tanh(of.read(source, u, lanes)), grad_h(u, lanes));
      store(grad + u, of_read, lanes);
      const Vector<T> of_n = of_read * load(of.factor + u, lanes);
      sum += of_n;
      product += of_n * of.moments.normalized(source);
    });
    of.mean = total(sum) / H;
    of.slope = total(product) / H;
    return of;
  }

  // What a step's product is given of a row, from the gradients of its gates [Cell::grads, H].
  void pass_recurrent(const Segment& segment, int64_t d, int64_t row, const T* products, const S* grads) const {
    const int64_t H = layer_.hidden;
    normalize_backward(
        moments_.at(segment, d, row)->recurrent, shape().gates, H, products + shape().gates * H,
        layer_.direction[d].norms.hh, [&](int64_t g) { return grads + g * H; }, recurrent.at(segment, d, row));
  }

  // After the scan of a segment: the gradients of its products with x, this thread's rows, and the gradients of factors
  // and biases, this thread's columns. All threads wait before the products that follow.
  template <class RowOf>
  void end(const Segment& segment, const SegmentValues<S>& gates, int thread, int threads, const RowOf& row_of) const {
    const int64_t H = layer_.hidden;
    for (int64_t d = 0; d < layer_.directions; ++d) {
      const Range own = range_of(segment.rows[d].size(), thread, threads);
      for (int64_t row = segment.rows[d].begin + own.begin; row < segment.rows[d].begin + own.end; ++row) {
        const S* grads = gates.at(segment, d, row);
        normalize_backward(
            moments_.at(segment, d, row)->input, shape().gates, H, row_of(d, row).products,
            layer_.direction[d].norms.ih, [&](int64_t g) { return grads + shape().input_grad[g] * H; },
            input.at(segment, d, row));
      }
      add_sums(segment, d, gates, range_of(H, thread, threads, 16), of_threads_ + thread * sums_of_unit() * H, row_of);
    }
  }

 private:
  // Sums of each unit over the rows of a segment: of every gate four, of the source two.
  int64_t sums_of_unit() const { return 4 * shape().gates + 2; }

  struct OfRow {
    Moments<T> input, recurrent, source;
  };

  static int64_t directions(const Layer<S>& layer) { return has_norms<Cell>(layer) ? layer.directions : 0; }

  template <class Count>
  RNNKIT_INLINE void load_saved(const T* saved, int64_t u, Count lanes, Vector<T>* save) const {
#pragma GCC unroll 8
    for (int64_t k = 0; k < Cell::saved; ++k) save[k] = load(saved + k * layer_.hidden + u, lanes);
  }
  template <class Count>
  RNNKIT_INLINE Vector<T> source_of(const T* saved, int64_t u, Count lanes) const {
    Vector<T> save[Cell::saved];
    load_saved(saved, u, lanes, save);
    return Cell::source(save);
  }

  // Adds a segment's part to the gradients of factors and biases of the units `own`, the first segment's to nothing.
  template <class RowOf>
  void add_sums(const Segment& segment, int64_t d, const SegmentValues<S>& gates, Range own, T* sums,
                const RowOf& row_of) const {
    const int64_t H = layer_.hidden, width = own.size();
    const Direction<S>& of = layer_.direction[d];
    if (width == 0) return;
    std::memset(sums, 0, sums_of_unit() * width * sizeof(T));
    for (int64_t row = segment.rows[d].begin; row < segment.rows[d].end; ++row) {
      const Row from = row_of(d, row);
      const S* grads = gates.at(segment, d, row);
      const OfRow& moments = *moments_.at(segment, d, row);
      for (int64_t g = 0; g < shape().gates; ++g)
        for_vectors<T>(width, [&](int64_t i, auto lanes) RNNKIT_INLINE_LAMBDA {
          const int64_t u = own.begin + i;
          const Vector<T> of_x = load(grads + shape().input_grad[g] * H + u, lanes),
                          of_h = load(grads + g * H + u, lanes);
          const T *x = from.products + g * H + u, *h = x + shape().gates * H;
          T* sum = sums + 4 * g * width + i;
          add(of_x, sum, lanes);
          add(of_h, sum + width, lanes);
          add(of_x * moments.input.normalized(load(x, lanes)), sum + 2 * width, lanes);
          add(of_h * moments.recurrent.normalized(load(h, lanes)), sum + 3 * width, lanes);
        });
      if constexpr (Cell::has_source)
        for_vectors<T>(width, [&](int64_t i, auto lanes) RNNKIT_INLINE_LAMBDA {
          const int64_t u = own.begin + i;
          const Vector<T> grad = load(grad_source_.at(segment, d, row) + u, lanes);
          T* sum = sums + 4 * shape().gates * width + i;
          add(grad, sum, lanes);
          add(grad * moments.source.normalized(source_of(from.saved, u, lanes)), sum + width, lanes);
        });
    }
    const bool adds = segment.index > 0;
    const auto leave = [&](const T* sum, T* to) {
      if (to == nullptr) return;
      if (!adds) std::memset(to, 0, width * sizeof(T));
      for_vectors<T>(width, [&](int64_t i, auto lanes) { add(load(sum + i, lanes), to + i, lanes); });
    };
    for (int64_t g = 0; g < shape().gates; ++g) {
      T* const places[] = {of.grad_b_ih, of.grad_b_hh, of.norms.grad_ih, of.norms.grad_hh};
      for (int64_t k = 0; k < 4; ++k) leave(sums + (4 * g + k) * width, at(places[k], g * H + own.begin));
    }
    leave(sums + 4 * shape().gates * width, at(of.norms.grad_c_bias, own.begin));
    leave(sums + (4 * shape().gates + 1) * width, at(of.norms.grad_c, own.begin));
  }

  template <class Count>
  static RNNKIT_INLINE void add(Vector<T> value, T* sum, Count lanes) {
    store(sum, load(sum, lanes) + value, lanes);
  }

  const auto& shape() const { return shape_of<Cell>(layer_); }

  const Layer<S>& layer_;
  SegmentValues<OfRow> moments_;
  SegmentValues<T> grad_source_;
  T* given_;
  T* of_threads_;  // for each thread [4 G + 2, H]
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
