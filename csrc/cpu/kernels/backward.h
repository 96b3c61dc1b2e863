// The backward pass of one layer, for any cell, a segment of steps at a time: the scan in reverse, which writes the
// gradients of the segment's gates; then their products with W_ih here, and with x and h in weight_gradients.h.
#pragma once

#include "cpu/kernels/recompute.h"
#include "cpu/kernels/weight_gradients.h"
#include "cpu/kernels/zoneout.h"

namespace rnnkit::RNNKIT_CAPABILITY {

template <class Cell, class S>
class Backward {
  using T = Sum<S>;

 public:
  Backward(const Layer<S>& layer, std::byte* scratch)
      : layer_(layer),
        projects_(projects<Cell>(layer)),
        clips_(layer.grad_clip < T(__builtin_inf())),
        zones_(std::any_of(layer.states, layer.states + shape().states, [](auto& s) { return s.zones(); })),
        reserve_row_(ReserveRow::of<Cell>(layer)),
        segments_(segments_of(layer)),
        max_rows_(max_rows(layer, segments_)),
        arena_(scratch),
        beginnings_{arena_.take<S>(layer.directions * layer.batch * layer.projected),
                    arena_.take<S>(layer.reset != nullptr ? layer.directions * layer.batch * layer.projected : 0)},
        grads_{{arena_, 2, layer.directions, max_rows_, shape().columns * layer.hidden},
               {arena_, 2, layer.directions, max_rows_, projects_ ? layer.projected : 0},
               {arena_, 2, layer.directions, max_rows_, projects_ ? layer.hidden : 0}},
        normalized_(layer, max_rows_, arena_),
        masked_(layer, max_rows_, beginnings_, arena_),
        recompute_(layer, max_rows_, beginnings_, masked_, arena_),
        weight_gradients_(layer, projects_, max_rows_, grads_, normalized_, beginnings_, masked_, arena_),
        stop_(layer.wants_to_stop, /*work=*/1e6),
        w_hh_(layer.directions),
        w_late_(layer.directions),
        w_ih_(layer.directions),
        w_hr_(layer.directions) {
    const int64_t D = layer.directions, N = layer.batch, H = layer.hidden, P = layer.projected, I = layer.input;
    grad_h_ = arena_.take<T>(D * N * P);
    grad_others_ = arena_.take<T>(D * N * shape().others * H);
    given_ = arena_.take<T>(shape().late > 0 ? D * N * H : 0);
    const int64_t K = shape().gates * H, recurrent = shape().early * H, late = shape().late * H;
    const bool pack_hh = Matrix<S>::must_pack(P) || is_worth_packing(layer.batch, layer.steps);
    const bool pack_ih = layer.grad_x != nullptr && layer.multiplies_input &&
                         (Matrix<S>::must_pack(I) || is_worth_packing(layer.rows()));
    for (int64_t d = 0; d < D; ++d) {
      const Direction<S>& weights = layer.direction[d];
      w_hh_[d] = {weights.w_hh, recurrent, P, arena_.take<S>(pack_hh ? Matrix<S>::packed_size(recurrent, P) : 0)};
      if (late > 0)
        w_late_[d] = {weights.w_hh + recurrent * P, late, P,
                      arena_.take<S>(pack_hh ? Matrix<S>::packed_size(late, P) : 0)};
      w_ih_[d] = {weights.w_ih, K, I, arena_.take<S>(pack_ih ? Matrix<S>::packed_size(K, I) : 0)};
      w_hr_[d] = {weights.w_hr, P, H, arena_.take<S>(projects_ ? Matrix<S>::packed_size(P, H) : 0)};
    }
  }

  int64_t scratch() const { return arena_.used(); }

  void run() {
    parallel(layer_.threads, [&](int thread, int threads, Barrier& all) {
      prepare(thread, threads);
      Barrier alone(1);
      all.wait();
      for (const Segment& segment : segments_) {
        if (stop_.before(segment.index, thread, threads > 1)) return;
        masked_.fill(segment, thread, threads);
        if (recomputes()) recompute_.run(segment, thread, threads, all);
        const auto row_of = [&](int64_t d, int64_t row) { return normalized_row(segment, d, row); };
        if (normalized_.there()) {
          normalized_.begin(segment, thread, threads, row_of);
          all.wait();
        }
        for_partitions_of(segment, thread, threads, [&](const Partition<S>& own) {
          for (int64_t s = segment.end - 1; s >= segment.begin; --s) step(segment, own, s, own.meets ? all : alone);
        });
        all.wait();
        weight_gradients_.pack(segment, thread, threads);
        if (normalized_.there()) normalized_.end(segment, grads_.gates, thread, threads, row_of);
        all.wait();
        for (int64_t d = 0; d < layer_.directions; ++d) {
          if (d > 0 && layer_.multiplies_input) all.wait();  // all directions add to grad_x
          input_gradient(segment, d, thread, threads);
          weight_gradients_.add(segment, d, thread, threads);
        }
      }
      if (std::all_of(layer_.states, layer_.states + shape().states, [](auto& s) { return s.grad_initial == nullptr; }))
        return;
      const Segment& first = segments_.back();
      for_partitions_of(first, thread, threads,
                        [&](const Partition<S>& own) { step(first, own, -1, own.meets ? all : alone); });
    });
  }

 private:
  static int64_t max_rows(const Layer<S>& layer, const std::vector<Segment>& segments) {
    int64_t rows = 0;
    for (const Segment& segment : segments)
      for (int64_t d = 0; d < layer.directions; ++d)
        rows = max_of(rows, round_up(segment.rows[d].size(), Operand<S>::pair));
    return rows;
  }

  bool recomputes() const { return Recompute<Cell, S>::needed(layer_); }

  template <class Body>
  void for_partitions_of(const Segment& segment, int thread, int threads, const Body& body) const {
    for_partitions(layer_, shape().gates, shape().units, segment.begin, segment.end, thread, threads, body);
  }

  // Packs the weights, and lays out what rows and what gradients begin with, this thread's part of them.
  void prepare(int thread, int threads) {
    const int64_t H = layer_.hidden, P = layer_.projected;
    for (int64_t d = 0; d < layer_.directions; ++d)
      for (const Matrix<S>* matrix : {&w_hh_[d], &w_late_[d], &w_ih_[d], &w_hr_[d]}) matrix->pack(thread, threads);
    recompute_.pack(thread, threads);
    const Range rows = range_of(layer_.directions * layer_.batch, thread, threads);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      copy_row(at(layer_.states[0].initial, i * P), P, beginnings_.initial + i * P);
      if (layer_.reset != nullptr) copy_row(at(layer_.states[0].reset, i * P), P, beginnings_.reset + i * P);
      for (int64_t k = 0; k < shape().states; ++k) {
        const int64_t width = k == 0 ? P : H;
        if (T* sum = layer_.states[k].grad_reset; sum != nullptr) std::memset(sum + i * width, 0, width * sizeof(T));
      }
      copy_row(at(layer_.states[0].grad_final, i * P), P, grad_h_ + i * P);
      for (int64_t k = 0; k < shape().others; ++k)
        copy_row(at(layer_.states[k + 1].grad_final, i * H), H, grad_others_ + (i * shape().others + k) * H);
    }
    if (layer_.grad_x != nullptr && adds_to_grad_x()) {
      const Range own = range_of(layer_.rows() * layer_.input, thread, threads, 64);
      std::memset(layer_.grad_x + own.begin, 0, own.size() * sizeof(T));
    }
  }

  // Backward of step s. s = -1 runs no cell: it only writes the gradients of the initial states of rows that begin at
  // step 0.
  void step(const Segment& segment, const Partition<S>& partition, int64_t s, Barrier& meet) {
    const bool fetch = outgrow_cache<S>(shape().recurrent * layer_.hidden * layer_.projected / partition.members);
    for_panels(layer_.projected, partition, s, [&](int64_t first, int64_t width, int64_t next) {
      step_of_h(segment, partition.rows, s, first, width, fetch ? next : first);
    });
    if (projects_) {
      meet.wait();
      for_panels(layer_.hidden, partition, s, [&](int64_t first, int64_t width, int64_t) {
        step_before_projection(segment, partition.rows, s, first, width);
      });
    }
    meet.wait();
    if constexpr (kIsRegistered<Cell>) {
      if (shape().late == 0) return;
      for_panels(layer_.hidden, partition, s, [&](int64_t first, int64_t width, int64_t next) {
        step_of_operand(segment, partition.rows, s, first, width, fetch ? next : first);
      });
      meet.wait();
    } else {
      if (!normalized_.there()) return;
      const Range own = range_of(partition.rows.active(s), partition.member, partition.members);
      for (int64_t n = own.begin; n < own.end; ++n) step_of_row(segment, partition.rows, s, n);
      meet.wait();
    }
  }

  // Calls body(first column, width, first column of the next panel) for each panel of a member's part of the columns.
  // At the ends of the part panels may be narrower.
  template <class Body>
  static void for_panels(int64_t columns, const Partition<S>& partition, int64_t s, const Body& body) {
    constexpr int64_t grain = 16;
    const Range own = range_of(columns, partition.member, partition.members, grain);
    if (own.size() == 0) return;
    const Sweep sweep({own.begin / kPanel, (own.end + kPanel - 1) / kPanel}, s);
    const auto first = [&](int64_t panel) { return max_of(own.begin, panel * kPanel); };
    for (int64_t i = 0; i < sweep.size(); ++i)
      body(first(sweep[i]), min_of(own.end, (sweep[i] + 1) * kPanel) - first(sweep[i]), first(sweep.next(i)));
  }

  template <class Count>
  static RNNKIT_INLINE void add(Vector<T> value, T* sum, Count lanes) {
    store(sum, load(sum, lanes) + value, lanes);
  }

  // What a step passes back, as Layer::grad_clip limits it.
  RNNKIT_INLINE Vector<T> clipped(Vector<T> grad) const {
    return clips_ ? -at_most(-at_most(grad, layer_.grad_clip), layer_.grad_clip) : grad;
  }

  // Columns first to first + width - 1 of the gradient of h between steps s and s + 1. dh = grad_h_ + dgates(s + 1)
  // W_hh, clipped, or zero where step s + 1 passes nothing back; a row that is not active at s + 1 has no product, and
  // its dh is grad_h_. A row that begins at s + 1 writes dh to the gradient of its initial h. A row that is put back
  // before s + 1 adds dh to the gradient of State::reset, and goes on with zero. All rows but those that begin add dY and
  // run the cell's backward of step s; with a projection they write dh to grads_.projected instead, for
  // step_before_projection. Of a cell with late gates only these gates' gradients are made, for step_of_operand. `next`:
  // the first column of the next panel, which is prefetched; `first`: none.
  void step_of_h(const Segment& segment, const ActiveRows<S>& rows, int64_t s, int64_t first, int64_t width,
                 int64_t next) {
    const int64_t d = rows.direction, P = layer_.projected, K = shape().early * layer_.hidden;
    const Carry here = rows.before(s), after = rows.before(s + 1);
    const bool cuts = rows.cuts(s + 1);
    const bool has_product = shape().early > 0;
    const bool needs_product = has_product && (!cuts || after.active > after.continuing || layer_.reset != nullptr);
    const Segment& of_after = s + 1 < segment.end ? segment : segments_[max_of(0, segment.index - 1)];
    const SegmentValues<S>& grads_of_product = normalized_.there() ? normalized_.recurrent : grads_.gates;
    const S* ahead = next != first ? w_hh_[d].ahead(0, next) : nullptr;
    const int64_t touched = max_of(here.active, after.active);
    alignas(64) T grad_recurrent[kRowBlock * kPanel];
    alignas(64) [[maybe_unused]] T grads[kIsRegistered<Cell> ? kRowBlock * kPanel : 1];  // of h after step s
    if (!has_product) std::memset(grad_recurrent, 0, sizeof grad_recurrent);
    for (int64_t m = 0; m < touched; m += kRowBlock) {
      const int64_t count = min_of(kRowBlock, touched - m);
      if (after.active > m && needs_product)
        w_hh_[d].multiply(min_of(count, after.active - m), round_up(width, kLanes<T>), K,
                          rows_of(grads_of_product.at(of_after, d, rows.first(s + 1) + m), grads_of_product.width()), 0,
                          first, grad_recurrent, kPanel, false, m == 0 ? ahead : nullptr);
      if (layer_.operand_mask != nullptr)
        for (int64_t i = 0; needs_product && i < min_of(count, after.active - m); ++i)
          masked<T>(grad_recurrent + i * kPanel,
                    layer_.operand_mask + (d * layer_.batch + rows.range.begin + m + i) * P + first, width,
                    grad_recurrent + i * kPanel);
      for (int64_t i = 0; i < count; ++i) {
        const Before before = after.of(m + i);
        const int64_t n = rows.range.begin + m + i, state = (d * layer_.batch + n) * P + first;
        const T* from_product = grad_recurrent + i * kPanel;
        T* grad_h = grad_h_ + state;
        if (before == Before::initial) {
          for_vectors<T>(width, [&](int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
            const Vector<T> grad = clipped(load(grad_h + u, lanes) + load(from_product + u));
            if (T* to = layer_.states[0].grad_initial; to != nullptr) store(to + state + u, grad, lanes);
            if (!projects_) finish_others(d, n, first + u, lanes);
          });
          continue;
        }
        const int64_t row = rows.first(s) + m + i;
        const T* grad_y = at(layer_.states[0].grad_all, (row * layer_.directions + d) * P + first);
        T* flow = at(layer_.states[0].flow, (row * layer_.directions + d) * P + first);
        S* grad_projected = projects_ ? grads_.projected.at(segment, d, row) + first : nullptr;
        const bool has_cell = !projects_ && !kIsRegistered<Cell>;
        const RowOfCell of = has_cell ? row_of_cell(segment, rows, s, m + i, here) : RowOfCell{};
        if (has_cell) add_grad_all(of, row, d, first, width);
        // Where the cell's backward follows for all units or all rows at once, its gradient of h.
        T* given = normalized_.there()   ? normalized_.given(d, n) + first
                   : shape().late > 0    ? given_ + state
                   : kIsRegistered<Cell> ? grads + i * kPanel
                                         : nullptr;
        const bool is_reset = before == Before::previous && rows.resets(s + 1, m + i), stops = cuts || is_reset;
        if (T* sum = at(layer_.states[0].grad_reset, state); is_reset && sum != nullptr)
          for_vectors<T>(width, [&](int64_t u, auto lanes) {
            add(clipped(load(grad_h + u, lanes) + load(from_product + u)), sum + u, lanes);
          });
        for_vectors<T>(width, [&](int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
          Vector<T> grad{};
          if (before == Before::carried)
            grad = load(grad_h + u, lanes);
          else if (!stops)
            grad = clipped(load(grad_h + u, lanes) + load(from_product + u));
          if (grad_y != nullptr) grad += load(grad_y + u, lanes);
          if (flow != nullptr) store(flow + u, grad, lanes);
          if (projects_) {
            store(grad_projected + u, grad, lanes);
            store(grad_h + u, Vector<T>{}, lanes);
          } else if (given != nullptr) {
            store(given + u, grad, lanes);
          } else if constexpr (!kIsRegistered<Cell>) {
            store(grad_h + u, cell<false>(of, first + u, lanes, grad), lanes);
          }
        });
      }
      if constexpr (kIsRegistered<Cell>) {
        const int64_t n_rows = min_of(count, here.active - m);
        if (shape().late > 0)
          registered_cell(segment, rows, s, m, n_rows, first, width, given(rows, m, first), {}, Part::late);
        else if (!projects_)
          registered_cell(segment, rows, s, m, n_rows, first, width, {grads, kPanel, 0});
      }
    }
  }

  // The gradient of h after a step of a cell with late gates, from row m of the range and unit `first` on.
  Block<const T> given(const ActiveRows<S>& rows, int64_t m, int64_t first) const {
    const int64_t n = rows.direction * layer_.batch + rows.range.begin + m;
    return {given_ + n * layer_.hidden + first, layer_.hidden, 0};
  }

  // Backward of a step of a cell with late gates, for units first to first + width - 1, once these gates' gradients are
  // there: that of the second operand, dgates(s) times the late gates' part of W_hh, and then the cell's backward.
  void step_of_operand(const Segment& segment, const ActiveRows<S>& rows, int64_t s, int64_t first, int64_t width,
                       int64_t next) {
    const int64_t d = rows.direction, H = layer_.hidden, active = rows.active(s);
    const S* ahead = next != first ? w_late_[d].ahead(0, next) : nullptr;
    alignas(64) T grads[kRowBlock * kPanel];
    for (int64_t m = 0; m < active; m += kRowBlock) {
      const int64_t count = min_of(kRowBlock, active - m);
      const S* late = grads_.gates.at(segment, d, rows.first(s) + m) + shape().early * H;
      w_late_[d].multiply(count, round_up(width, kLanes<T>), shape().late * H, rows_of(late, grads_.gates.width()), 0,
                          first, grads, kPanel, false, m == 0 ? ahead : nullptr);
      const auto mask = [&](int64_t i) {
        return layer_.operand_mask + (d * layer_.batch + rows.range.begin + m + i) * H + first;
      };
      for (int64_t i = 0; layer_.operand_mask != nullptr && i < count; ++i)
        masked<T>(grads + i * kPanel, mask(i), width, grads + i * kPanel);
      registered_cell(segment, rows, s, m, count, first, width, given(rows, m, first), {grads, kPanel, 0}, Part::rest);
      for (int64_t i = 0; layer_.operand_mask != nullptr && i < count; ++i) {
        S* operand = grads_.gates.at(segment, d, rows.first(s) + m + i) + (shape().columns - 1) * H + first;
        masked<T>(operand, mask(i), width, operand);
      }
    }
  }

  // With a projection: the gradient of h before it, for units first to first + width - 1, and the cell's backward.
  void step_before_projection(const Segment& segment, const ActiveRows<S>& rows, int64_t s, int64_t first,
                              int64_t width) {
    const int64_t d = rows.direction, P = layer_.projected;
    const Carry here = rows.before(s), after = rows.before(s + 1);
    alignas(64) T grads[kRowBlock * kPanel];
    for (int64_t m = 0; m < here.active; m += kRowBlock) {
      const int64_t count = min_of(kRowBlock, here.active - m);
      w_hr_[d].multiply(count, round_up(width, kLanes<T>), P,
                        rows_of(grads_.projected.at(segment, d, rows.first(s) + m), P), 0, first, grads, kPanel, false);
      if constexpr (kIsRegistered<Cell>) {
        registered_cell(segment, rows, s, m, count, first, width, {grads, kPanel, 0});
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        const RowOfCell of = row_of_cell(segment, rows, s, m + i, here);
        add_grad_all(of, rows.first(s) + m + i, d, first, width);
        if (normalized_.there())
          copy_row(grads + i * kPanel, width, normalized_.given(d, rows.range.begin + m + i) + first);
        else if constexpr (!kIsRegistered<Cell>)
          for_vectors<T>(width, [&](int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
            cell<false>(of, first + u, lanes, load(grads + i * kPanel + u));
          });
      }
    }
    for (int64_t n = after.continuing; n < after.active; ++n)
      for_vectors<T>(width, [&](int64_t u, auto lanes) { finish_others(d, rows.range.begin + n, first + u, lanes); });
  }

  // With layer normalization: the cell's backward of row n of the range, whose gradient of h all units have.
  void step_of_row(const Segment& segment, const ActiveRows<S>& rows, int64_t s, int64_t n) {
    const int64_t d = rows.direction, H = layer_.hidden, row = rows.first(s) + n, in_batch = rows.range.begin + n;
    RowOfCell of = row_of_cell(segment, rows, s, n, rows.before(s));
    const T* given = normalized_.given(d, in_batch);
    const auto grad_given = [&](int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
      return parted(layer_.states[0], of.place + u, lanes, load(given + u, lanes)).of_now;
    };
    if constexpr (Cell::has_source) of.source = normalized_.source(segment, d, row, of.saved, grad_given);
    T* grad_h = projects_ ? nullptr : grad_h_ + (d * layer_.batch + in_batch) * H;
    for_vectors<T>(H, [&](int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
      const Vector<T> passed = cell<true>(of, u, lanes, load(given + u, lanes));
      if (grad_h != nullptr) store(grad_h + u, passed, lanes);
    });
    normalized_.pass_recurrent(segment, d, row, normalized_row(segment, d, row).products, of.grads);
  }

  // The gradients of the initial states other than h, for some units of row n of the batch, which begins here.
  template <class Count>
  RNNKIT_INLINE void finish_others(int64_t d, int64_t n, int64_t unit, Count lanes) const {
    const int64_t H = layer_.hidden, row = d * layer_.batch + n;
    for (int64_t k = 0; k < shape().others; ++k)
      if (T* grad_initial = layer_.states[k + 1].grad_initial; grad_initial != nullptr)
        store(grad_initial + row * H + unit, load(grad_others_ + (row * shape().others + k) * H + unit, lanes), lanes);
  }

  // What the cell's backward reads and writes of one row, each from unit 0 on; null: not there.
  struct RowOfCell {
    const T* saved;           // [saved, H]
    const S *h, *previous_h;  // h after the step, and before it
    const T* given;           // the h that the step gave, where zoneout left another one
    T* grad_others;           // [others, H]: on entry of the states after the step, on return of those before it
    S *grads, *unprojected;   // grads: [columns, H]
    bool stops;               // whether the step passes nothing back to the step before
    bool is_reset;            // whether that is because the row is put back between them
    int64_t state;            // where the row begins in State::grad_reset of states other than h
    int64_t place;            // where the row begins in State::kept, and in State::flow of states other than h
    typename NormalizedGrads<Cell, S>::Source source;  // with layer normalization, of a cell that has one
  };
  // `n`: the row in the range.
  RowOfCell row_of_cell(const Segment& segment, const ActiveRows<S>& rows, int64_t s, int64_t n, Carry carry) const {
    const int64_t d = rows.direction, H = layer_.hidden, row = rows.first(s) + n;
    RowOfCell of{};
    const T* reserve = layer_.reserve + (d * layer_.rows() + row) * reserve_row_.values * H;
    of.saved = recomputes() ? recompute_.saved(segment, d, row) : reserve;
    if (keeps_given<Cell>(layer_)) of.given = reserve + reserve_row_.given * H;
    if (shape().uses_h) of.h = layer_.y + (row * layer_.directions + d) * H;
    if (shape().uses_previous_h) of.previous_h = rows.h_before(s, n, carry, beginnings_);
    of.grad_others = at(grad_others_, (d * layer_.batch + rows.range.begin + n) * shape().others * H);
    of.grads = grads_.gates.at(segment, d, row);
    of.place = (row * layer_.directions + d) * H;
    of.is_reset = carry.of(n) == Before::previous && rows.resets(s, n);
    of.stops = of.is_reset || (rows.cuts(s) && carry.of(n) == Before::previous);
    of.state = (d * layer_.batch + rows.range.begin + n) * H;
    if (projects_) of.unprojected = grads_.unprojected.at(segment, d, row);
    return of;
  }

  // What is normalized of a row.
  typename NormalizedGrads<Cell, S>::Row normalized_row(const Segment& segment, int64_t d, int64_t row) const {
    if (recomputes()) return {recompute_.saved(segment, d, row), recompute_.products(segment, d, row)};
    const T* reserve = layer_.reserve + (d * layer_.rows() + row) * reserve_row_.values * layer_.hidden;
    return {reserve, reserve + reserve_row_.products * layer_.hidden};
  }

  // Adds the gradients of the states other than h after this step, for units first to first + width - 1 of a row.
  void add_grad_all(const RowOfCell& of, int64_t row, int64_t d, int64_t first, int64_t width) const {
    const int64_t H = layer_.hidden;
    for (int64_t k = 0; k < shape().others; ++k) {
      const T* grad_all = at(layer_.states[k + 1].grad_all, (row * layer_.directions + d) * H + first);
      T* sum = of.grad_others + k * H + first;
      if (grad_all == nullptr) continue;
      for_vectors<T>(width, [&](int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
        store(sum + u, load(sum + u, lanes) + load(grad_all + u, lanes), lanes);
      });
    }
  }

  // The gradients of the states after a step, for some units of a row.
  template <class Count>
  RNNKIT_INLINE void load_grads(const RowOfCell& of, int64_t unit, Count lanes, Vector<T> grad_h,
                                Vector<T>* grad) const {
    grad[0] = grad_h;
    for_most<kMostStates<Cell> - 1>(shape().others, [&](int64_t k, bool is_there) RNNKIT_INLINE_LAMBDA {
      grad[k + 1] = is_there ? load(of.grad_others + k * layer_.hidden + unit, lanes) : Vector<T>{};
    });
  }

  // Zoneout: leaves in `grad` the part of the state that the cell gave. `of_old`: that of the state before the step.
  template <class Count>
  RNNKIT_INLINE void part(const RowOfCell& of, int64_t unit, Count lanes, Vector<T>* grad, Vector<T>* of_old) const {
    for (int64_t k = 0; k < shape().states; ++k) {
      const auto parts = parted(layer_.states[k], of.place + unit, lanes, grad[k]);
      grad[k] = parts.of_now, of_old[k] = parts.of_old;
    }
  }

  // Writes the flow of the states other than h, from their gradients and from these as the step makes them whole.
  template <class Count>
  RNNKIT_INLINE void store_flow(const RowOfCell& of, int64_t unit, Count lanes, const Vector<T>* grad,
                                const Vector<T>* whole) const {
    for_most<kMostStates<Cell> - 1>(shape().others, [&](int64_t i, bool is_there) RNNKIT_INLINE_LAMBDA {
      const State<T>& state = layer_.states[i + 1];
      if (is_there) store(state.flow + of.place + unit, state.zones() ? grad[i + 1] : whole[i + 1], lanes);
    });
  }

  // Writes the gradients of the states other than h before a step, from those of all states.
  template <class Count>
  RNNKIT_INLINE void pass_back(const RowOfCell& of, int64_t unit, Count lanes, const Vector<T>* grad) const {
    for_most<kMostStates<Cell> - 1>(shape().others, [&](int64_t k, bool is_there) RNNKIT_INLINE_LAMBDA {
      if (!is_there) return;
      const Vector<T> passed = clipped(grad[k + 1]);
      store(of.grad_others + k * layer_.hidden + unit, of.stops ? Vector<T>{} : passed, lanes);
      if (!of.stops) return;
      if (T* sum = layer_.states[k + 1].grad_reset; of.is_reset && sum != nullptr)
        add(passed, sum + of.state + unit, lanes);
    });
  }

  // The cell's backward for some units of a row. Returns the gradient of the previous h that does not come through the
  // gates.
  template <bool kNormalizes, class Count>
  RNNKIT_INLINE Vector<T> cell(const RowOfCell& of, int64_t unit, Count lanes, Vector<T> grad_h) const {
    using V = Vector<T>;
    const int64_t H = layer_.hidden;
    V save[Cell::saved + 1], grad_state[Cell::states], grad[Cell::grads], h{}, previous_h{};
#pragma GCC unroll 8
    for (int64_t k = 0; k < Cell::saved; ++k) save[k] = load(of.saved + k * H + unit, lanes);
    if constexpr (Cell::uses_previous_h) previous_h = load(of.previous_h + unit, lanes);
    if constexpr (Cell::uses_h) h = of.given != nullptr ? load(of.given + unit, lanes) : load(of.h + unit, lanes);
    load_grads(of, unit, lanes, grad_h, grad_state);
    V of_source{};
    if constexpr (kNormalizes && Cell::has_source) of_source = of.source.passed(Cell::source(save), unit, lanes);
    if constexpr (Cell::states > 1)
      if (layer_.states[1].flow != nullptr) {
        V whole[Cell::states], old[Cell::states];
        std::memcpy(whole, grad_state, sizeof(whole));
        part(of, unit, lanes, whole, old);
        if constexpr (kNormalizes && Cell::has_source)
          whole[1] += of_source;
        else
          Cell::grad_states(save, whole);
        store_flow(of, unit, lanes, grad_state, whole);
      }
    V of_old[Cell::states] = {};
    if (zones_) part(of, unit, lanes, grad_state, of_old);
    if constexpr (kNormalizes && Cell::has_source) {
      grad_state[1] += of_source;
      Cell::backward_of(save, tanh(of.source.read(Cell::source(save), unit, lanes)), grad_state, grad);
    } else {
      Cell::backward(save, h, previous_h, grad_state, grad);
    }
    if (zones_)
      for (int64_t k = 0; k < Cell::states; ++k) grad_state[k] += of_old[k];
#pragma GCC unroll 8
    for (int64_t k = 0; k < Cell::grads; ++k) store(of.grads + k * H + unit, grad[k], lanes);
    pass_back(of, unit, lanes, grad_state);
    if (of.unprojected != nullptr) {
      V output{};
      if constexpr (kNormalizes && Cell::has_source)
        output = Cell::output_of(save, of.source.read(Cell::source(save), unit, lanes));
      else
        output = Cell::output(save);
      store(of.unprojected + unit, output, lanes);
    }
    return grad_state[0];
  }

  // What registered_cell does: everything, or of a cell with late gates these gates' gradients, and later the rest.
  enum class Part { whole, late, rest };

  // A registered cell's backward for rows m to m + count - 1 of the range and units first to first + width - 1. grad_h,
  // grad_operand: as in BackwardBlock. The part of the gradient of h before the step which does not come through the
  // gates is written to grad_h_, unless h is projected.
  void registered_cell(const Segment& segment, const ActiveRows<S>& rows, int64_t s, int64_t m, int64_t count,
                       int64_t first, int64_t width, Block<const T> grad_h, Block<const T> grad_operand = {},
                       Part which = Part::whole) const {
    constexpr int64_t kRows = 16;  // of a call, whose blocks then stay in L1
    const int64_t d = rows.direction, H = layer_.hidden, states = shape().states;
    const Pointwise<T>& pointwise = layer_.cell->template pointwise<T>();
    const void* context = layer_.cell->context;
    const Carry here = rows.before(s);
    alignas(64) T result[kRows * kMostStates<Cell> * kPanel], previous_h[kRows * kPanel];
    alignas(64) T of_now[kRows * kMostStates<Cell> * kPanel], of_old[kRows * kMostStates<Cell> * kPanel];
    const auto load_states = [&](const T* from, int64_t i, int64_t u, auto lanes, Vector<T>* to) RNNKIT_INLINE_LAMBDA {
      for_most<kMostStates<Cell>>(states, [&](int64_t k, bool is_there) RNNKIT_INLINE_LAMBDA {
        to[k] = is_there ? load(from + (i * states + k) * kPanel + u, lanes) : Vector<T>{};
      });
    };
    const auto store_states = [&](const Vector<T>* from, int64_t i, int64_t u, auto lanes, T* to) {
      for (int64_t k = 0; k < states; ++k) store(to + (i * states + k) * kPanel + u, from[k], lanes);
    };
    const auto advance = [](Block<const T>& block) { block.base = at(block.base, kRows * block.row); };
    for (; count > 0; m += kRows, count -= kRows, advance(grad_h), advance(grad_operand)) {
      const int64_t n_rows = min_of(kRows, count), row = rows.first(s) + m;
      RowOfCell of[kRows];
      for (int64_t i = 0; i < n_rows; ++i) {
        of[i] = row_of_cell(segment, rows, s, m + i, here);
        if (which != Part::rest) add_grad_all(of[i], row + i, d, first, width);
        if (shape().uses_previous_h) copy_row(of[i].previous_h + first, width, previous_h + i * kPanel);
      }
      const auto for_values = [&](const auto& body) {
        for (int64_t i = 0; i < n_rows; ++i)
          for_vectors<T>(width, [&](int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA { body(i, u, lanes); });
      };
      const int64_t saved_row = (recomputes() ? shape().saved : reserve_row_.values) * H;
      BackwardBlock<T> block{.rows = n_rows,
                             .units = width,
                             .saved = {of[0].saved + first, saved_row, H},
                             .parameters = {at(layer_.direction[d].unit, first), 0, H},
                             .h = {at(of[0].h, first), layer_.directions * H, 0},
                             .previous_h = {previous_h, kPanel, 0},
                             .grad_h = grad_h,
                             .grad_others = {at(of[0].grad_others, first), shape().others * H, H},
                             .grad_operand = grad_operand,
                             .result = {result, states * kPanel, kPanel},
                             .grad = {of[0].grads + first, shape().columns * H, H}};
      if (of[0].given != nullptr) block.h = {of[0].given + first, reserve_row_.values * H, 0};
      if (zones_) {
        for_values([&](int64_t i, int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
          Vector<T> now[kMostStates<Cell>], old[kMostStates<Cell>];
          load_grads(of[i], first + u, lanes, load(grad_h.base + i * grad_h.row + u, lanes), now);
          part(of[i], first + u, lanes, now, old);
          store_states(now, i, u, lanes, of_now);
          store_states(old, i, u, lanes, of_old);
        });
        block.grad_h = {of_now, states * kPanel, 0};
        block.grad_others = {of_now + kPanel, states * kPanel, kPanel};
      }
      if (which == Part::late) {
        block.result = {of[0].grads + shape().early * H + first, shape().columns * H, H};
        pointwise.late_grads(context, block);
        continue;
      }
      if (states > 1 && layer_.states[1].flow != nullptr) {
        pointwise.grad_states(context, block);
        for_values([&](int64_t i, int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
          Vector<T> grad[kMostStates<Cell>], whole[kMostStates<Cell>];
          load_grads(of[i], first + u, lanes, Vector<T>{}, grad);
          load_states(result, i, u, lanes, whole);
          store_flow(of[i], first + u, lanes, grad, whole);
          // Other states may be made of the h that the cell gave, which is the state if neither zoneout nor a projection
          // follows.
          if (T* flow = layer_.states[0].flow; flow != nullptr && !projects_ && !layer_.states[0].zones())
            store(flow + of[i].place + first + u, whole[0], lanes);
        });
      }
      T* const passed = projects_ ? nullptr : grad_h_ + (d * layer_.batch + rows.range.begin + m) * H + first;
      const bool at_once = states == 1 && passed != nullptr && !zones_;  // nothing is left to do with the result
      if (at_once) block.result = {passed, H, 0};
      pointwise.backward(context, block);
      if (!at_once)
        for_values([&](int64_t i, int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
          Vector<T> grad[kMostStates<Cell>];
          load_states(result, i, u, lanes, grad);
          if (zones_) {
            Vector<T> old[kMostStates<Cell>];
            load_states(of_old, i, u, lanes, old);
            for (int64_t k = 0; k < states; ++k) grad[k] += old[k];
          }
          pass_back(of[i], first + u, lanes, grad);
          if (passed != nullptr) store(passed + i * H + u, grad[0], lanes);
        });
      if (projects_) {
        block.result = {grads_.unprojected.at(segment, d, row) + first, H, 0};
        pointwise.output(context, block);
      }
    }
  }

  // Calls run(first gate, number of gates, place of the first one's gradient) for each group of consecutive gates whose
  // input parts' gradients are consecutive.
  template <class Run>
  void for_input_gates(const Run& run) const {
    const auto& input_grad = shape().input_grad;
    for (int64_t g = 0; g < shape().gates;) {
      int64_t end = g + 1;
      while (end < shape().gates && input_grad[end] == input_grad[end - 1] + 1) ++end;
      run(g, end - g, input_grad[g]);
      g = end;
    }
  }

  // Whether directions add to grad_x, instead of writing it.
  bool adds_to_grad_x() const { return layer_.directions > 1 && layer_.multiplies_input; }

  // grad_x, the sum over directions of the gates' gradients times W_ih, or these gradients themselves if x holds the
  // products.
  void input_gradient(const Segment& segment, int64_t d, int thread, int threads) {
    if (layer_.grad_x == nullptr) return;
    if (!layer_.multiplies_input) return copy_input_gradient(segment, d, thread, threads);
    constexpr int64_t block = 96;  // rows of one product
    const int64_t H = layer_.hidden, I = layer_.input;
    const int64_t count = segment.rows[d].size(), blocks = (count + block - 1) / block;
    const int64_t panels = (I + kPanel - 1) / kPanel;
    const bool fetch = outgrow_cache<S>(shape().gates * H * I);
    const Range tasks = range_of(blocks * panels, thread, threads);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const Range rows = range_of(count, task / panels, blocks);
      const int64_t row = segment.rows[d].begin + rows.begin;
      const int64_t first = task % panels * kPanel, next = (task + 1) % panels * kPanel;
      bool add = adds_to_grad_x();
      if (normalized_.there()) {
        w_ih_[d].multiply(rows.size(), min_of(kPanel, I - first), shape().gates * H,
                          rows_of(normalized_.input.at(segment, d, row), normalized_.input.width()), 0, first,
                          layer_.grad_x + row * I + first, I, add, fetch ? w_ih_[d].ahead(0, next) : nullptr);
        continue;
      }
      for_input_gates([&](int64_t gate, int64_t gates, int64_t place) {
        const int64_t after = gate + gates < shape().gates ? gate + gates : 0;
        w_ih_[d].multiply(rows.size(), min_of(kPanel, I - first), gates * H,
                          rows_of(grads_.gates.at(segment, d, row) + place * H, grads_.gates.width()), gate * H, first,
                          layer_.grad_x + row * I + first, I, add,
                          fetch ? w_ih_[d].ahead(after * H, after > 0 ? first : next) : nullptr);
        add = true;
      });
    }
  }

  void copy_input_gradient(const Segment& segment, int64_t d, int thread, int threads) const {
    const int64_t H = layer_.hidden, gates = shape().gates;
    const Range own = range_of(segment.rows[d].size(), thread, threads);
    for (int64_t r = own.begin; r < own.end; ++r) {
      const int64_t row = segment.rows[d].begin + r;
      T* to = layer_.grad_x + row * layer_.input + d * gates * H;
      for (int64_t g = 0; g < gates; ++g) {
        const S* from = normalized_.there() ? normalized_.input.at(segment, d, row) + g * H
                                            : grads_.gates.at(segment, d, row) + shape().input_grad[g] * H;
        copy_row(from, H, to + g * H);
      }
    }
  }

  const auto& shape() const { return shape_of<Cell>(layer_); }

  const Layer<S>& layer_;
  const bool projects_, clips_, zones_;
  const ReserveRow reserve_row_;
  const std::vector<Segment> segments_;
  const int64_t max_rows_;  // of a segment, in one direction
  Arena arena_;
  Beginnings<S> beginnings_;
  SegmentGrads<S> grads_;
  NormalizedGrads<Cell, S> normalized_;
  MaskedOperands<S> masked_;
  Recompute<Cell, S> recompute_;
  WeightGradients<Cell, S> weight_gradients_;
  Stop stop_;
  // Gradients of the states between two steps. grad_h_ has no part through W_hh: of a row that no step has reached it
  // is the gradient of the final h; after that, what the cell's backward returned for the previous h.
  T *grad_h_, *grad_others_;  // [D, N, P], [D, N, others, H]
  T* given_;  // [D, N, H]: between the two parts of a step, the gradient of h after it; null without late gates
  PerDirection<Matrix<S>> w_hh_, w_late_, w_ih_, w_hr_;
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
