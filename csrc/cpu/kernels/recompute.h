// What the forward pass would have saved of a segment, computed again from x, y and the states that it kept: one step
// of the forward scan whose rows are those of all steps of the segment, for each has its recurrent operand already.
#pragma once

#include "cpu/kernels/gates.h"
#include "cpu/kernels/layer_norm.h"
#include "cpu/kernels/segment.h"
#include "cpu/kernels/zoneout.h"

namespace rnnkit::RNNKIT_CAPABILITY {

template <class Cell, class S>
class Recompute {
  using T = Sum<S>;
  using GatesOf = Gates<Cell, S>;

 public:
  Recompute(const Layer<S>& layer, int64_t max_rows, const Beginnings<S>& beginnings, const MaskedOperands<S>& masked,
            Arena& arena)
      : layer_(layer),
        beginnings_(beginnings),
        masked_(masked),
        gates_(layer, needed(layer), needed(layer), false, arena),
        saved_(arena, 1, needed(layer) ? layer.directions : 0, max_rows, shape().saved * layer.hidden),
        products_(arena, 1, needed(layer) && (has_norms<Cell>(layer) || shape().late > 0) ? layer.directions : 0,
                  max_rows,
                  shape().late > 0 ? gates_.panels() * (gates_.input_width() + gates_.recurrent_width())
                                   : 2 * shape().gates * layer.hidden),
        operand_(arena, 1, needed(layer) && shape().late > 0 ? layer.directions : 0, max_rows, layer.hidden),
        h_(arena, 1, needed(layer) ? layer.directions : 0, max_rows, layer.projected) {}

  static bool needed(const Layer<S>& layer) {
    return layer.keep == Keep::states && (shape_of<Cell>(layer).saved > 0 || has_norms<Cell>(layer));
  }

  // This thread's part of the weights.
  void pack(int thread, int threads) const {
    if (needed(layer_)) gates_.pack(thread, threads);
  }

  // All threads' parts are there when the last one returns.
  void run(const Segment& segment, int thread, int threads, Barrier& all) const {
    for (int64_t d = 0; d < layer_.directions; ++d) {
      const Range own = range_of(segment.rows[d].size(), thread, threads);
      RecurrentOperands<S> operands(layer_, segment, d, beginnings_);
      for (int64_t r = own.begin; r < own.end; ++r)
        copy_row(operands.row(r), layer_.projected, h_.begin(segment, d) + r * layer_.projected);
    }
    all.wait();
    const auto for_blocks = [&](const auto& body) {
      const int64_t panels = gates_.panels();
      const Range tasks = range_of(layer_.directions * panels, thread, threads);
      for (int64_t task = tasks.begin; task < tasks.end; ++task) {
        const int64_t d = task / panels, p = task % panels, count = segment.rows[d].size();
        for (int64_t m = 0; m < count; m += kRowBlock) body(d, p, m, min_of(kRowBlock, count - m));
      }
      all.wait();
    };
    if constexpr (kIsRegistered<Cell>)
      if (shape().late > 0) {
        for_blocks([&](auto... block) { late_step(segment, block..., true); });
        return for_blocks([&](auto... block) { late_step(segment, block..., false); });
      }
    for_blocks([&](auto... block) { step(segment, block...); });
    if constexpr (!kIsRegistered<Cell>) {
      if (!has_norms<Cell>(layer_)) return;
      for (int64_t d = 0; d < layer_.directions; ++d) {
        const Range own = range_of(segment.rows[d].size(), thread, threads);
        for (int64_t r = own.begin; r < own.end; ++r) normalized_row(segment, d, segment.rows[d].begin + r);
      }
      all.wait();
    }
  }

  // Of one row [Cell::saved, H], and with layer normalization the products of all gates with x and with h [2, G, H].
  const T* saved(const Segment& segment, int64_t d, int64_t row) const { return saved_.at(segment, d, row); }
  const T* products(const Segment& segment, int64_t d, int64_t row) const { return products_.at(segment, d, row); }

 private:
  void step(const Segment& segment, int64_t d, int64_t p, int64_t first, int64_t count) const {
    constexpr int64_t most = kRowBlock * kMostWidth<Cell>;
    const int64_t width = gates_.input_width(), recurrent_width = gates_.recurrent_width();
    const int64_t H = layer_.hidden, P = layer_.projected, unit = p * gates_.units();
    const int64_t row = segment.rows[d].begin + first, reserve_row = kept_values() * H;
    const S* h = h_.at(segment, d, row);
    const S* operand = masked_.there() ? masked_.of(segment, d).row(first) : h;
    const T* others = shape().others > 0 ? layer_.reserve + (d * layer_.rows() + row) * reserve_row + unit : nullptr;
    T* saved = saved_.at(segment, d, row) + unit;
    alignas(64) T input[most], recurrent[most];
    gates_.input(d, p, p, count, layer_.x + row * layer_.input, input);
    if (shape().recurrent > 0) gates_.w_hh[d].multiply(count, operand, p, p, recurrent);
    if (has_norms<Cell>(layer_)) {
      T* products = products_.at(segment, d, row);
      for (int64_t i = 0; i < count; ++i) {
        gates_.unpack(input + i * width, p, products + i * 2 * shape().gates * H);
        gates_.unpack(recurrent + i * width, p, products + (2 * i + 1) * shape().gates * H);
      }
      return;
    }
    if constexpr (kIsRegistered<Cell>) {
      alignas(64) T after[kRowBlock * kMostStates<Cell> * kMostUnits];
      const int64_t units = shape().units;
      gates_.call(gates_.pointwise().forward, d, p, count, {input, width, units}, {recurrent, recurrent_width, units},
                  {h + unit, P, 0}, {others, reserve_row, H}, {after, shape().states * units, units},
                  {saved, shape().saved * H, H});
    } else {
      for (int64_t i = 0; i < count; ++i)
        for_vectors<T>(gates_.units_in(p), [&](int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
          Vector<T> state[Cell::states], save[Cell::saved + 1];
          GatesOf::load_states(h + i * P + unit, others + i * reserve_row, H, u, lanes, state);
          GatesOf::cell(input + i * width, recurrent + i * recurrent_width, gates_.bias(d, p), u, lanes, state, save);
          GatesOf::store_saved(save, H, lanes, saved + i * Cell::saved * H + u);
        });
    }
  }

  // step() of a cell with late gates: first the products and the second operand; then, when that of all units is there,
  // the rest.
  void late_step(const Segment& segment, int64_t d, int64_t p, int64_t first, int64_t count, bool operand) const {
    const int64_t width = gates_.input_width(), recurrent_width = gates_.recurrent_width(), units = shape().units;
    const int64_t H = layer_.hidden, unit = p * units;
    const int64_t row = segment.rows[d].begin + first, reserve_row = kept_values() * H;
    const S *h = h_.at(segment, d, row), *operands = masked_.there() ? masked_.of(segment, d).row(first) : h;
    const T* others = shape().others > 0 ? layer_.reserve + (d * layer_.rows() + row) * reserve_row + unit : nullptr;
    T* input = products_.at(segment, d, row) + p * (width + recurrent_width);
    T* recurrent = input + width;
    S* to = operand_.at(segment, d, row);
    const int64_t ld = products_.width();
    alignas(64) T after[kRowBlock * kMostStates<Cell> * kMostUnits];
    if (operand) {
      alignas(64) T block[kRowBlock * kMostWidth<Cell>];
      gates_.input(d, p, p, count, layer_.x + row * layer_.input, block);
      for (int64_t i = 0; i < count; ++i) copy_row(block + i * width, width, input + i * ld);
      if (shape().early > 0) gates_.w_hh[d].multiply(count, operands, p, p, recurrent, ld);
    } else {
      gates_.w_late[d].multiply(count, to, p, p, recurrent + shape().early * units, ld);
    }
    const auto& pointwise = gates_.pointwise();
    gates_.call(operand ? pointwise.operand : pointwise.forward, d, p, count, {input, ld, units},
                {recurrent, ld, units}, {h + unit, H, 0}, {others, reserve_row, H},
                operand ? Block<T>{to + unit, H, 0} : Block<T>{after, shape().states * units, units},
                operand ? Block<T>{} : Block<T>{saved_.at(segment, d, row) + unit, shape().saved * H, H});
    if (!operand || layer_.operand_mask == nullptr) return;
    RecurrentOperands<S> of_rows(layer_, segment, d, beginnings_);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = of_rows.batch_row(first + i);
      masked<T>(to + i * H + unit, layer_.operand_mask + (d * layer_.batch + n) * H + unit, gates_.units_in(p),
                to + i * H + unit);
    }
  }

  // Values of a row that the forward pass kept, [values, H]: the states other than h, and the h that the step gave.
  int64_t kept_values() const { return shape().others + (keeps_given<Cell>(layer_) ? 1 : 0); }

  // The cell of a row, from its products.
  void normalized_row(const Segment& segment, int64_t d, int64_t row) const {
    using V = Vector<T>;
    if (Cell::saved == 0) return;
    const int64_t H = layer_.hidden;
    const NormalizedRow<Cell, S> of(layer_, d, products_.at(segment, d, row));
    const T* others = shape().others > 0 ? layer_.reserve + (d * layer_.rows() + row) * kept_values() * H : nullptr;
    for_vectors<T>(H, [&](int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
      V x[Cell::gates], h[Cell::gates], state[Cell::states], save[Cell::saved + 1];
      GatesOf::load_states(h_.at(segment, d, row), others, H, u, lanes, state);
      of.parts(u, lanes, x, h);
      Cell::forward(x, h, state, save);
      GatesOf::store_saved(save, H, lanes, saved_.at(segment, d, row) + u);
    });
  }

  const auto& shape() const { return shape_of<Cell>(layer_); }

  const Layer<S>& layer_;
  const Beginnings<S> beginnings_;
  const MaskedOperands<S>& masked_;
  GatesOf gates_;
  SegmentValues<T> saved_;     // [D, rows, Cell::saved, H]
  SegmentValues<T> products_;  // [D, rows, 2, G, H]; with late gates [D, rows, panels, G + R, units]
  SegmentValues<S> operand_;   // [D, rows, H]: the second operand of a cell with late gates
  SegmentValues<S> h_;         // [D, rows, P]: h before each row's step
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
