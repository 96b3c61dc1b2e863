// The forward scan of one layer, for any cell. A thread multiplies its units' (or rows') inputs a few steps ahead, then
// takes these steps.
#pragma once

#include "cpu/kernels/gates.h"
#include "cpu/kernels/layer_norm.h"
#include "cpu/kernels/packed.h"
#include "cpu/kernels/zoneout.h"

namespace rnnkit::RNNKIT_CAPABILITY {

template <class Cell, class S>
class Forward {
  using T = Sum<S>;
  using GatesOf = Gates<Cell, S>;

 public:
  Forward(const Layer<S>& layer, std::byte* scratch)
      : layer_(layer),
        arena_(scratch),
        packed_(behind_header(const_cast<std::byte*>(layer.packed))),
        gates_(layer, packs(layer, layer.rows()), packs(layer, layer.batch, layer.steps),
               projects<Cell>(layer) && packs(layer, layer.batch, layer.steps),
               layer.packed != nullptr ? packed_ : arena_),
        stop_(layer.wants_to_stop, double(layer.batch) * shape().gates * layer.hidden *
                                       ((layer.multiplies_input ? layer.input : 1) + layer.projected)) {
    const int64_t D = layer.directions, N = layer.batch, P = layer.projected;
    h_ = arena_.take<S>(D * 2 * N * P);
    masked_ = arena_.take<S>(layer.operand_mask != nullptr ? D * 2 * N * P : 0);
    others_ = arena_.take<T>(D * N * shape().others * layer.hidden);
    unprojected_ = arena_.take<S>(projects<Cell>(layer) ? D * N * layer.hidden : 0);
    const int64_t row_size = gates_.panels() * gates_.input_width();
    ahead_size_ = max_of(min_of(most_ahead_, layer.rows() * row_size), N * row_size);
    gathered_size_ = layer.multiplies_input ? round_up(kRowsAhead * layer.input, 64) : 0;
    // The products and, of a cell with a source, what is made of them, of the rows that a thread normalizes.
    const int64_t values = 2 * shape().gates + (Cell::has_source ? shape().gates + 1 : 0);
    normalized_size_ = has_norms<Cell>(layer) ? round_up(kRowsNormalized * values * layer.hidden, 64) : 0;
    of_threads_ = arena_.take<T>(layer.threads * (ahead_size_ + gathered_size_ + normalized_size_));
    const bool late = shape().late > 0;
    products_ = arena_.take<T>(has_norms<Cell>(layer) || late ? D * N * gates_.panels() * gates_.recurrent_width() : 0);
    operand_ = arena_.take<S>(late ? D * N * layer.hidden : 0);
  }

  int64_t scratch() const { return arena_.used(); }

  static int64_t packed_size(const Layer<S>& layer) {
    Arena arena = behind_header(nullptr);
    GatesOf(layer, true, true, projects<Cell>(layer), arena);
    return arena.used();
  }

  static void pack(const Layer<S>& layer, std::byte* packed) {
    *reinterpret_cast<PackedHeader*>(packed) = PackedHeader(name_of<Cell>(layer), layer);
    Arena arena = behind_header(packed);
    const GatesOf gates(layer, true, true, projects<Cell>(layer), arena);
    parallel(layer.threads, [&](int thread, int threads, Barrier&) { gates.pack(thread, threads); });
  }

  // Whether a buffer of packed_size bytes holds weights that were packed here, for such a layer.
  static bool check(const Layer<S>& layer, const std::byte* packed) {
    return *reinterpret_cast<const PackedHeader*>(packed) == PackedHeader(name_of<Cell>(layer), layer);
  }

  void run() {
    const Split split(layer_, shape().gates, shape().units, layer_.threads);
    const bool splits = layer_.directions * split.blocks * split.members > 1;
    parallel(splits ? layer_.threads : 1, [&](int thread, int threads, Barrier& all) {
      prepare(thread, threads);
      all.wait();
      Barrier alone(1);
      for_partitions(layer_, shape().gates, shape().units, 0, layer_.steps, thread, threads,
                     [&](const Partition<S>& own) { scan(own, thread, own.meets ? all : alone); });
    });
  }

 private:
  static constexpr int64_t kRowsAhead =
      256;  // rows whose input a thread multiplies ahead, at most; one step in any case

  static constexpr int64_t kRowsNormalized = 4;  // rows that normalized_step takes from their products to their states

  static Arena behind_header(std::byte* packed) {
    Arena arena(packed);
    arena.take<PackedHeader>(1);
    return arena;
  }

  static bool packs(const Layer<S>& layer, int64_t rows, int64_t times = 1) {
    return layer.packed != nullptr || is_worth_packing(rows, times);
  }

  // Packs the weights and lays out the initial states, this thread's part of them.
  void prepare(int thread, int threads) {
    if (layer_.packed == nullptr) gates_.pack(thread, threads);
    const int64_t H = layer_.hidden, P = layer_.projected;
    const Range rows = range_of(layer_.directions * layer_.batch, thread, threads);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      for (int64_t buffer = 0; buffer < 2; ++buffer) {
        const int64_t d = i / layer_.batch, n = i % layer_.batch;
        copy_row(at(layer_.states[0].initial, i * P), P, h(d, buffer) + n * P);
        mask_row(d, buffer, n, 0, P);
      }
      for (int64_t k = 0; k < shape().others; ++k)
        copy_row(at(layer_.states[k + 1].initial, i * H), H, others_ + (i * shape().others + k) * H);
    }
  }

  // h before steps with s % 2 == buffer, in direction d [N, P].
  S* h(int64_t d, int64_t buffer) const { return h_ + (d * 2 + buffer) * layer_.batch * layer_.projected; }

  // The recurrent operand of these steps, [N, P]: h, or what Layer::operand_mask makes of it.
  S* operand(int64_t d, int64_t buffer) const {
    return (masked_ == nullptr ? h_ : masked_) + (d * 2 + buffer) * layer_.batch * layer_.projected;
  }

  // Makes the operand of `count` elements of h, from `first` on, of row n of the batch.
  void mask_row(int64_t d, int64_t buffer, int64_t n, int64_t first, int64_t count) const {
    if (masked_ == nullptr) return;
    const int64_t place = n * layer_.projected + first;
    const T* mask = layer_.operand_mask + d * layer_.batch * layer_.projected + place;
    masked<T>(h(d, buffer) + place, mask, count, operand(d, buffer) + place);
  }

  void scan(const Partition<S>& partition, int thread, Barrier& meet) {
    const ActiveRows<S>& rows = partition.rows;
    const int64_t d = rows.direction;
    const bool normalizes = has_norms<Cell>(layer_);
    const int64_t width = gates_.input_width();
    const Range own = range_of(gates_.panels(), partition.member, partition.members);
    // Members that normalize rows read all panels of these, and have one memory, that of the thread with the direction's
    // number: it is the first member.
    const int64_t first_panel = normalizes ? 0 : own.begin;
    const auto of_thread = [&](int64_t i) {
      return of_threads_ + i * (ahead_size_ + gathered_size_ + normalized_size_);
    };
    T* const ahead = of_thread(normalizes && partition.meets ? d : thread);
    T* const gathered = of_thread(thread) + ahead_size_;
    // The same for all members, so that they meet after the same steps without waiting for each other.
    const int64_t max_panels =
        normalizes ? gates_.panels() : (gates_.panels() + partition.members - 1) / partition.members;
    const int64_t max_rows = min_of(kRowsAhead, most_ahead_ / (max_panels * width));
    const bool fetch = outgrow_cache<S>(own.size() * gates_.recurrent_width() * layer_.projected);
    const bool fetch_input = outgrow_cache<S>(own.size() * width * layer_.input);
    for (int64_t s = 0; s < layer_.steps;) {
      int64_t end = s, count = 0;
      while (end < layer_.steps && (end == s || count + rows.active(end) <= max_rows)) count += rows.active(end++);
      const bool multiplies = layer_.multiplies_input;
      const S* x = multiplies ? gather_input(rows, s, end, reinterpret_cast<S*>(gathered)) : nullptr;
      for (int64_t p = own.begin; count > 0 && p < own.end; ++p) {
        T* to = ahead + (p - first_panel) * count * width;
        if (multiplies) gates_.input(d, p, fetch_input && p + 1 < own.end ? p + 1 : p, count, x, to);
        for (int64_t t = s; !multiplies && t < end; to += rows.active(t++) * width)
          gates_.input(d, p, p, rows.active(t), layer_.x + rows.first(t) * layer_.input, to);
      }
      for (int64_t done = 0; s < end; ++s) {
        if (stop_.before(s, thread, partition.meets)) return;
        const Sweep sweep(own, s);
        for (int64_t i = 0; i < sweep.size(); ++i)
          step(rows, s, sweep[i], fetch ? sweep.next(i) : sweep[i],
               ahead + ((sweep[i] - first_panel) * count + done) * width);
        if constexpr (!kIsRegistered<Cell>) {
          if (normalizes) {
            meet.wait();
            normalized_step(rows, s, range_of(rows.active(s), partition.member, partition.members),
                            ahead + done * width, count, gathered + gathered_size_);
          }
        } else if (shape().late > 0) {
          meet.wait();
          for (int64_t i = 0; i < sweep.size(); ++i)
            late_step(rows, s, sweep[i], fetch ? sweep.next(i) : sweep[i],
                      ahead + ((sweep[i] - first_panel) * count + done) * width);
        }
        done += rows.active(s);
        meet.wait();
        if (!projects<Cell>(layer_)) continue;
        project(rows, s, range_of(layer_.projected, partition.member, partition.members, kPanel));
        meet.wait();
      }
    }
  }

  // The rows of x of steps s to end - 1, one step after the other. In x they are consecutive if it is one step, or if
  // the range is the whole batch and time goes forward. Otherwise they are gathered, for one product of many rows.
  const S* gather_input(const ActiveRows<S>& rows, int64_t s, int64_t end, S* gathered) const {
    const int64_t I = layer_.input;
    const bool together = end - s == 1 || (rows.range.size() == layer_.batch && !layer_.reverses(rows.direction));
    if (together && rows.active(s) > 0) return layer_.x + rows.first(s) * I;
    S* to = gathered;
    for (; s < end; ++s) {
      const int64_t count = rows.active(s) * I;
      if (count > 0) std::memcpy(to, layer_.x + rows.first(s) * I, count * sizeof(S));
      to += count;
    }
    return gathered;
  }

  // One step of panel p's units, for all active rows. `input`: the rows' panel of x W_ihᵀ. With layer normalization only
  // the product, which normalized_step goes on with; of a cell with late gates only the second operand and the product
  // that it is made of, with which late_step goes on.
  void step(const ActiveRows<S>& rows, int64_t s, int64_t p, int64_t next, const T* input) {
    const int64_t d = rows.direction, P = layer_.projected, active = rows.active(s);
    const int64_t input_width = gates_.input_width(), width = gates_.recurrent_width();
    const S* operands = operand(d, s % 2) + rows.range.begin * P;
    const bool zeros = s == 0 && layer_.states[0].initial == nullptr && active > 0 && gates_.w_hh[d].is_finite(p);
    const bool normalizes = has_norms<Cell>(layer_), late = shape().late > 0;
    alignas(64) T block[kRowBlock * kMostWidth<Cell>];
    for (int64_t m = 0; m < active; m += kRowBlock) {
      const int64_t count = min_of(kRowBlock, active - m);
      T* recurrent = normalizes || late ? products(rows, p, m) : block;
      if (zeros)
        std::memset(recurrent, 0, count * width * sizeof(T));
      else if (shape().early > 0)
        gates_.w_hh[d].multiply(count, operands + m * P, p, m == 0 ? next : p, recurrent, width);
      if constexpr (kIsRegistered<Cell>) {
        if (late)
          second_operand(rows, s, p, m, count, input + m * input_width, recurrent);
        else
          registered_cell(rows, s, p, m, count, input + m * input_width, recurrent);
      } else if (!normalizes)
        cell(rows, s, p, m, count, input + m * input_width, recurrent,
             [&, bias = gates_.bias(d, p)](int64_t, const T* x, const T* h, int64_t u, auto lanes, Vector<T>* state,
                                           Vector<T>* save)
                 RNNKIT_INLINE_LAMBDA { GatesOf::cell(x, h, bias, u, lanes, state, save); });
    }
  }

  // Of a cell with late gates: the second operand of panel p's units, for rows m to m + count - 1 of the range.
  void second_operand(const ActiveRows<S>& rows, int64_t s, int64_t p, int64_t m, int64_t count, const T* input,
                      const T* recurrent) {
    const int64_t d = rows.direction, H = layer_.hidden, units = shape().units, unit = p * units;
    const int64_t n = rows.range.begin + m, place = (d * layer_.batch + n) * H + unit;
    gates_.call(gates_.pointwise().operand, d, p, count, {input, gates_.input_width(), units},
                {recurrent, gates_.recurrent_width(), units}, {h(d, s % 2) + n * H + unit, H, 0},
                {at(others_, (d * layer_.batch + n) * shape().others * H + unit), shape().others * H, H},
                {operand_ + place, H, 0}, {});
    if (layer_.operand_mask == nullptr) return;
    for (int64_t i = 0; i < count; ++i)
      masked<T>(operand_ + place + i * H, layer_.operand_mask + place + i * H, gates_.units_in(p),
                operand_ + place + i * H);
  }

  // The rest of a step of a cell with late gates, once the second operand of all units is there.
  void late_step(const ActiveRows<S>& rows, int64_t s, int64_t p, int64_t next, const T* input) {
    const int64_t d = rows.direction, H = layer_.hidden, active = rows.active(s);
    const S* operands = operand_ + (d * layer_.batch + rows.range.begin) * H;
    for (int64_t m = 0; m < active; m += kRowBlock) {
      const int64_t count = min_of(kRowBlock, active - m);
      T* recurrent = products(rows, p, m);
      gates_.w_late[d].multiply(count, operands + m * H, p, m == 0 ? next : p,
                                recurrent + shape().early * shape().units, gates_.recurrent_width());
      registered_cell(rows, s, p, m, count, input + m * gates_.input_width(), recurrent);
    }
  }

  // cell() for a registered cell, whose pointwise part is called first, for all rows at once.
  void registered_cell(const ActiveRows<S>& rows, int64_t s, int64_t p, int64_t m, int64_t count, const T* input,
                       const T* recurrent) {
    const int64_t d = rows.direction, H = layer_.hidden, P = layer_.projected;
    const int64_t states = shape().states, units = shape().units, unit = p * units, n = rows.range.begin + m;
    const int64_t values = ReserveRow::of<Cell>(layer_).values;
    alignas(64) T after[kRowBlock * kMostStates<Cell> * kMostUnits];
    T* saved = nullptr;
    if (layer_.keep == Keep::everything && shape().saved > 0)
      saved = layer_.reserve + (d * layer_.rows() + rows.first(s) + m) * values * H + unit;
    gates_.call(gates_.pointwise().forward, d, p, count, {input, gates_.input_width(), units},
                {recurrent, gates_.recurrent_width(), units}, {h(d, s % 2) + n * P + unit, P, 0},
                {at(others_, (d * layer_.batch + n) * shape().others * H + unit), shape().others * H, H},
                {after, states * units, units}, {saved, values * H, H});
    cell(rows, s, p, m, count, input, recurrent,
         [&](int64_t i, const T*, const T*, int64_t u, auto lanes, Vector<T>* state, Vector<T>*) RNNKIT_INLINE_LAMBDA {
           for_most<kMostStates<Cell>>(states, [&](int64_t k, bool is_there) RNNKIT_INLINE_LAMBDA {
             state[k] = is_there ? load(after + (i * states + k) * units + u, lanes) : Vector<T>{};
           });
         });
  }

  // With layer normalization, or late gates: panel p of h W_hhᵀ, from row m of the range on.
  T* products(const ActiveRows<S>& rows, int64_t p, int64_t m) const {
    return products_ +
           ((rows.direction * gates_.panels() + p) * layer_.batch + rows.range.begin + m) * gates_.recurrent_width();
  }

  // With layer normalization: a step of the active rows `own` of the range, from their products. `input`: the first
  // panel of x W_ihᵀ at the range's first row; from panel to panel it is `input_rows` rows. `scratch`: the thread's.
  void normalized_step(const ActiveRows<S>& rows, int64_t s, Range own, const T* input, int64_t input_rows,
                       T* scratch) {
    using V = Vector<T>;
    const int64_t d = rows.direction, H = layer_.hidden;
    const ReserveRow of_row = ReserveRow::of<Cell>(layer_);
    for (int64_t m = own.begin; m < own.end; m += kRowsNormalized) {
      const int64_t count = min_of(kRowsNormalized, own.end - m);
      NormalizedRow<Cell, S> of[kRowsNormalized];
      for (int64_t i = 0; i < count; ++i) {
        T* to = scratch + i * 2 * Cell::gates * H;
        if (layer_.keep == Keep::everything)
          to = layer_.reserve + ((d * layer_.rows() + rows.first(s) + m + i) * of_row.values + of_row.products) * H;
        for (int64_t p = 0; p < gates_.panels(); ++p) {
          gates_.unpack(input + (p * input_rows + m + i) * gates_.input_width(), p, to);
          gates_.unpack(products(rows, p, m + i), p, to + Cell::gates * H);
        }
        of[i] = {layer_, d, to};
      }
      // Of a cell with a source, its gates and the source [gates + 1, H], and the source's moments.
      const auto activated = [&](int64_t i) {
        return scratch + (2 * kRowsNormalized * Cell::gates + i * (Cell::gates + 1)) * H;
      };
      Moments<T> of_source[kRowsNormalized];
      if constexpr (Cell::has_source)
        for (int64_t i = 0; i < count; ++i) {
          const T* c = others_ + (d * layer_.batch + rows.range.begin + m + i) * shape().others * H;
          T* to = activated(i);
          for_vectors<T>(H, [&](int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
            V x[Cell::gates], h[Cell::gates], save[Cell::saved];
            of[i].parts(u, lanes, x, h);
            Cell::activate(x, h, save);
            save[Cell::gates] = load(c + u, lanes);
#pragma GCC unroll 4
            for (int64_t g = 0; g < Cell::gates; ++g) store(to + g * H + u, save[g], lanes);
            store(to + Cell::gates * H + u, Cell::source(save), lanes);
          });
          of_source[i] = moments(H, static_cast<const T*>(to + Cell::gates * H));
        }
      const Norms<T>& norms = layer_.direction[d].norms;
      for (int64_t p = 0; p < gates_.panels(); ++p)
        cell(rows, s, p, m, count, input, input,
             [&](int64_t i, const T*, const T*, int64_t u, auto lanes, V* state, V* save) RNNKIT_INLINE_LAMBDA {
               const int64_t unit = p * Cell::units + u;
               if constexpr (Cell::has_source) {
                 const T* from = activated(i) + unit;
#pragma GCC unroll 4
                 for (int64_t g = 0; g < Cell::gates; ++g) save[g] = load(from + g * H, lanes);
                 save[Cell::gates] = state[1];
                 state[1] = load(from + Cell::gates * H, lanes);
                 state[0] = Cell::output_of(save, of_source[i].normalized(state[1]) * load(norms.c + unit, lanes) +
                                                      load(norms.c_bias + unit, lanes));
               } else {
                 V x[Cell::gates], h[Cell::gates];
                 of[i].parts(unit, lanes, x, h);
                 Cell::forward(x, h, state, save);
               }
             });
    }
  }

  // The cell, for rows m to m + count - 1 of the range and panel p's units. Without a projection its h is the operand
  // of the next step's product, and is written there; a row that is put back before the next step gets its new states
  // instead. A row that begins at the next step finds its initial h there, which both buffers held from the start.
  // give(i, input, recurrent, u, lanes, state, save): the states after the step and what the cell saves, of the units
  // from u on of row m + i.
  template <class Give>
  void cell(const ActiveRows<S>& rows, int64_t s, int64_t p, int64_t m, int64_t count, const T* input,
            const T* recurrent, const Give& give) {
    using V = Vector<T>;
    const int64_t d = rows.direction, H = layer_.hidden, P = layer_.projected, width = layer_.directions * P;
    const int64_t units = gates_.units_in(p), unit = p * gates_.units();
    const int64_t n = rows.range.begin + m, row = rows.first(s) + m, state_row = d * layer_.batch + n;
    const Carry next = rows.before(s + 1);
    const int64_t n_others = shape().others;
    const bool keeps_states = n_others > 0 && layer_.keep == Keep::states;
    // A registered cell has written what it saves.
    const bool keeps_all = !kIsRegistered<Cell> && shape().saved > 0 && layer_.keep == Keep::everything;
    const bool zones = std::any_of(layer_.states, layer_.states + shape().states, [](auto& s) { return s.zones(); });
    const bool keeps_h = layer_.keep != Keep::nothing && keeps_given<Cell>(layer_);
    const ReserveRow of_reserve = ReserveRow::of<Cell>(layer_);
    const int64_t reserve_row = of_reserve.values * H;
    // Each of these goes on by a row at the end of the loop.
    const S* h_before = h(d, s % 2) + n * P + unit;
    S* h_after = h(d, (s + 1) % 2) + n * P + unit;
    S* y = layer_.y + row * width + d * P + unit;
    S* unprojected = at(unprojected_, state_row * H + unit);
    T* others = at(others_, state_row * shape().others * H + unit);
    T* reserve = keeps_states || keeps_all || keeps_h ? layer_.reserve + (d * layer_.rows() + row) * reserve_row + unit
                                                      : nullptr;
    T* final_h = layer_.states[0].final + state_row * P + unit;
    const auto is_reset = [&](int64_t i) { return !next.carries(m + i) && rows.resets(s + 1, m + i); };
    for (int64_t i = 0; i < count; ++i) {
      const bool ends = next.carries(m + i);
      for_vectors<T>(units, [&](int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
        V state[kMostStates<Cell>], save[kMostSaved<Cell> + 1];
        if constexpr (!kIsRegistered<Cell>) GatesOf::load_states(h_before, others, H, u, lanes, state);
        if (keeps_states)
          for_most<kMostStates<Cell> - 1>(n_others, [&](int64_t k, bool is_there) RNNKIT_INLINE_LAMBDA {
            if (is_there) store(reserve + k * H + u, load(others + k * H + u, lanes), lanes);
          });
        give(i, input, recurrent, u, lanes, state, save);
        if (keeps_h) store(reserve + of_reserve.given * H + u, state[0], lanes);
        if (zones) zone(h_before + u, others + u, ((row + i) * layer_.directions + d) * H + unit + u, lanes, state);
        if constexpr (!kIsRegistered<Cell>)
          if (keeps_all) GatesOf::store_saved(save, H, lanes, reserve + u);
        for_most<kMostStates<Cell> - 1>(n_others, [&](int64_t k, bool is_there) RNNKIT_INLINE_LAMBDA {
          if (is_there) store(others + k * H + u, state[k + 1], lanes);
        });
        if (unprojected != nullptr) {
          store(unprojected + u, state[0], lanes);
        } else {
          store(h_after + u, state[0], lanes);
          store(y + u, state[0], lanes);
          if (ends) store(final_h + u, state[0], lanes);
        }
      });
      if (unprojected == nullptr) {
        if (is_reset(i)) copy_row(at(layer_.states[0].reset, (state_row + i) * P + unit), units, h_after);
        mask_row(d, (s + 1) % 2, n + i, unit, units);
      }
      input += gates_.input_width(), recurrent += gates_.recurrent_width(), h_before += P, h_after += P, y += width,
          final_h += P;
      unprojected = at(unprojected, H), others = at(others, shape().others * H), reserve = at(reserve, reserve_row);
    }
    for (int64_t k = 0; k < shape().others; ++k) {
      const State<T>& state = layer_.states[k + 1];
      const auto after = [&](int64_t i) { return others_ + ((state_row + i) * shape().others + k) * H + unit; };
      for (int64_t i = 0; i < count; ++i)
        if (next.carries(m + i)) copy_row(after(i), units, state.final + (state_row + i) * H + unit);
      for (int64_t i = 0; state.all != nullptr && i < count; ++i)
        copy_row(after(i), units, state.all + ((row + i) * layer_.directions + d) * H + unit);
      for (int64_t i = 0; layer_.reset != nullptr && i < count; ++i)
        if (is_reset(i)) copy_row(at(state.reset, (state_row + i) * H + unit), units, after(i));
    }
  }

  // Zoneout of the states that have it. h, others: before the step; others [others, H]. h has none with a projection.
  template <class Count>
  RNNKIT_INLINE void zone(const S* h, const T* others, int64_t place, Count lanes, Vector<T>* state) const {
    for_most<kMostStates<Cell>>(shape().states, [&](int64_t k, bool is_there) RNNKIT_INLINE_LAMBDA {
      if (!is_there || !layer_.states[k].zones()) return;
      const Vector<T> old = k == 0 ? load(h, lanes) : load(others + (k - 1) * layer_.hidden, lanes);
      state[k] = zoned(layer_.states[k], place, lanes, old, state[k]);
    });
  }

  // With a projection: h W_hrᵀ of all active rows, in the columns `own`, is the operand of the next step's product.
  void project(const ActiveRows<S>& rows, int64_t s, Range own) {
    const int64_t d = rows.direction, H = layer_.hidden, P = layer_.projected, active = rows.active(s);
    const Carry next = rows.before(s + 1);
    const S* from = unprojected_ + (d * layer_.batch + rows.range.begin) * H;
    alignas(64) T block[kRowBlock * kPanel];
    for (int64_t first = own.begin; first < own.end; first += kPanel) {
      const int64_t p = first / kPanel, columns = gates_.w_hr[d].units_in(p);
      for (int64_t m = 0; m < active; m += kRowBlock) {
        const int64_t count = min_of(kRowBlock, active - m);
        gates_.w_hr[d].multiply(count, from + m * H, p, p, block);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t n = rows.range.begin + m + i;
          const T* row = block + i * kPanel;
          S* after = h(d, (s + 1) % 2) + n * P + first;
          copy_row(row, columns, after);
          if (!next.carries(m + i) && rows.resets(s + 1, m + i))
            copy_row(at(layer_.states[0].reset, (d * layer_.batch + n) * P + first), columns, after);
          mask_row(d, (s + 1) % 2, n, first, columns);
          copy_row(row, columns, layer_.y + ((rows.first(s) + m + i) * layer_.directions + d) * P + first);
          if (next.carries(m + i)) copy_row(row, columns, layer_.states[0].final + (d * layer_.batch + n) * P + first);
        }
      }
    }
  }

  const auto& shape() const { return shape_of<Cell>(layer_); }

  const Layer<S>& layer_;
  const int64_t most_ahead_ = cache_sizes().l2 / 4 / int64_t(sizeof(T));  // elements of x W_ihᵀ that a thread keeps
  Arena arena_, packed_;
  GatesOf gates_;
  Stop stop_;
  S *h_, *masked_;  // [D, 2, N, P]: read from one, written to the other. masked_: null without a mask
  T* others_;       // [D, N, others, H]: the states other than h
  S* unprojected_;  // [D, N, H], null without a projection
  T* of_threads_;  // for each thread: x W_ihᵀ of the steps ahead, the gathered rows of x, and normalized_step's scratch
  T* products_;    // [D, panels, N, R*units]: h W_hhᵀ of a step; null without layer normalization and late gates
  S* operand_;     // [D, N, H]: the second operand of a step; null without late gates
  int64_t ahead_size_, gathered_size_, normalized_size_;
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
