// The forward scan of one layer, for any cell. A thread projects its own units' (or rows') inputs a few steps ahead,
// then takes these steps.
#pragma once

#include "cpu/kernels/gates.h"

namespace rnnkit::RNNKIT_CAPABILITY {

template <class Cell, class S>
class Forward {
  using T = Sum<S>;
  using GatesOf = Gates<Cell, S>;

 public:
  Forward(const Layer<S>& layer, std::byte* scratch)
      : layer_(layer),
        arena_(scratch),
        packed_(const_cast<std::byte*>(layer.packed)),
        gate_products_(layer, is_worth_packing(layer, layer.rows()), is_worth_packing(layer, layer.batch, layer.steps),
                       projects(layer) && is_worth_packing(layer, layer.batch, layer.steps),
                       layer.packed != nullptr ? packed_ : arena_),
        stop_(layer.wants_to_stop, double(layer.batch) * Cell::gates * layer.hidden * (layer.input + layer.projected)) {
    const int64_t D = layer.directions, N = layer.batch, P = layer.projected;
    h_ = arena_.take<S>(D * 2 * N * P);
    others_ = arena_.take<T>(D * N * kOthers<Cell> * layer.hidden);
    unprojected_ = arena_.take<S>(projects(layer) ? D * N * layer.hidden : 0);
    const int64_t row_size = gate_products_.panels() * kWidth;
    gates_size_ = max_of(min_of(ahead_, layer.rows() * row_size), N * row_size);
    gathered_size_ = round_up(kRowsAhead * layer.input, 64);
    gates_ = arena_.take<T>(layer.threads * (gates_size_ + gathered_size_));
  }

  int64_t scratch() const { return arena_.used(); }

  static int64_t packed_size(const Layer<S>& layer) {
    Arena arena(nullptr);
    GatesOf(layer, true, true, projects(layer), arena);
    return arena.used();
  }

  static void pack(const Layer<S>& layer, std::byte* packed) {
    Arena arena(packed);
    const GatesOf gates(layer, true, true, projects(layer), arena);
    parallel(layer.threads, [&](int thread, int threads, Barrier&) { gates.pack(thread, threads); });
  }

  void run() {
    const Split split(layer_, Cell::gates, Cell::units, layer_.threads);
    const bool splits = layer_.directions * split.blocks * split.members > 1;
    parallel(splits ? layer_.threads : 1, [&](int thread, int threads, Barrier& all) {
      prepare(thread, threads);
      all.wait();
      Barrier alone(1);
      for_shares(layer_, Cell::gates, Cell::units, 0, layer_.steps, thread, threads, [&](const Share<S>& own) {
        scan(own, thread, gates_ + thread * (gates_size_ + gathered_size_), own.meets ? all : alone);
      });
    });
  }

 private:
  static constexpr int64_t kUnits = GatesOf::kUnits, kWidth = GatesOf::kWidth;
  static constexpr int64_t kRowsAhead = 256;  // of projected input that a thread keeps at most, if of several steps

  // Packs the weights and lays out the initial states, this thread's part of them.
  void prepare(int thread, int threads) {
    if (layer_.packed == nullptr) gate_products_.pack(thread, threads);
    const int64_t H = layer_.hidden, P = layer_.projected;
    const Range states = range_of(layer_.directions * layer_.batch, thread, threads);
    for (int64_t i = states.begin; i < states.end; ++i) {
      for (int64_t buffer = 0; buffer < 2; ++buffer)
        copy_row(at(layer_.states[0].initial, i * P), P, h(i / layer_.batch, buffer) + i % layer_.batch * P);
      for (int64_t k = 0; k < kOthers<Cell>; ++k)
        copy_row(at(layer_.states[k + 1].initial, i * H), H, others_ + (i * kOthers<Cell> + k) * H);
    }
  }

  static bool projects(const Layer<S>& layer) { return kCanProject<Cell> && layer.direction[0].w_hr != nullptr; }

  // Whether a matrix is read often enough: `times` by a product of so many rows.
  static bool is_worth_packing(const Layer<S>& layer, int64_t rows, int64_t times = 1) {
    return layer.packed != nullptr || times * ((rows + kDotRows - 1) / kDotRows) > kFewSteps;
  }

  S* h(int64_t d, int64_t buffer) const { return h_ + (d * 2 + buffer) * layer_.batch * layer_.projected; }

  void scan(const Share<S>& share_of, int thread, T* gates, Barrier& meet) {
    const ActiveRows<S>& rows = share_of.rows;
    const Range own = range_of(gate_products_.panels(), share_of.member, share_of.members);
    // The same for all members, who would else take turns in waiting for each other.
    const int64_t most_panels = (gate_products_.panels() + share_of.members - 1) / share_of.members;
    const int64_t rows_ahead = min_of(kRowsAhead, ahead_ / (most_panels * kWidth));
    const bool fetch = outgrow_cache<S>(own.size() * kWidth * layer_.projected);
    const bool fetch_input = outgrow_cache<S>(own.size() * kWidth * layer_.input);
    for (int64_t s = 0; s < layer_.steps;) {
      int64_t end = s, ahead = 0;
      while (end < layer_.steps && (end == s || ahead + rows.active(end) <= rows_ahead)) ahead += rows.active(end++);
      const S* x = gather_input(rows, s, end, reinterpret_cast<S*>(gates + gates_size_));
      for (int64_t p = own.begin; ahead > 0 && p < own.end; ++p)
        gate_products_.input(ahead, x, rows.direction, p, fetch_input && p + 1 < own.end ? p + 1 : p,
                             gates + (p - own.begin) * ahead * kWidth);
      for (int64_t done = 0; s < end; ++s) {
        if (stop_.before(s, thread, share_of.meets)) return;
        const Sweep sweep(own, s);
        for (int64_t i = 0; i < sweep.size(); ++i)
          step(rows, s, sweep[i], fetch ? sweep.next(i) : sweep[i],
               gates + ((sweep[i] - own.begin) * ahead + done) * kWidth);
        done += rows.active(s);
        meet.wait();
        if (!projects(layer_)) continue;
        project_output(rows, s, range_of(layer_.projected, share_of.member, share_of.members, kPanel));
        meet.wait();
      }
    }
  }

  // The rows of x for visits s to end, one visit after the other. Those of one visit lie together in x; so do those of
  // all, if all of the batch is ours and time goes forward. Else they are gathered, for products of many rows.
  const S* gather_input(const ActiveRows<S>& rows, int64_t s, int64_t end, S* gathered) const {
    const int64_t I = layer_.input;
    const bool together = end - s == 1 || (rows.range.size() == layer_.batch && rows.direction == 0);
    if (together && rows.active(s) > 0) return layer_.x + rows.first(s) * I;
    S* to = gathered;
    for (; s < end; ++s) {
      const int64_t count = rows.active(s) * I;
      if (count > 0) std::memcpy(to, layer_.x + rows.first(s) * I, count * sizeof(S));
      to += count;
    }
    return gathered;
  }

  // One step of one panel's units, for all rows active.
  void step(const ActiveRows<S>& rows, int64_t s, int64_t p, int64_t next, const T* gates) {
    const int64_t d = rows.direction, P = layer_.projected, active = rows.active(s);
    const S* h_before = h(d, s % 2) + rows.range.begin * P;
    const bool zeros = s == 0 && layer_.states[0].initial == nullptr && active > 0 && gate_products_.annuls_zeros(d, p);
    alignas(64) T recurrent[kRowBlock * kWidth];
    for (int64_t m = 0; m < active; m += kRowBlock) {
      const int64_t count = min_of(kRowBlock, active - m);
      if (zeros)
        std::memset(recurrent, 0, count * kWidth * sizeof(T));
      else
        gate_products_.recurrent(count, h_before + m * P, d, p, m == 0 ? next : p, recurrent);
      cell(rows, s, p, m, count, gates + m * kWidth, recurrent);
    }
  }

  // The cell, for rows m to m + count of the range and one panel's units. Their h is the operand of the next step's
  // product; both operand buffers began with the initial h, which a row that begins there finds.
  void cell(const ActiveRows<S>& rows, int64_t s, int64_t p, int64_t m, int64_t count, const T* gates,
            const T* recurrent) {
    using V = Vector<T>;
    const int64_t d = rows.direction, H = layer_.hidden, P = layer_.projected, width = layer_.directions * P;
    const int64_t units = gate_products_.units_in(p), unit = p * kUnits;
    const int64_t n = rows.range.begin + m, row = rows.first(s) + m, state_row = d * layer_.batch + n;
    const Carry next = rows.before(s + 1);
    const bool keeps_states = kOthers<Cell> > 0 && layer_.keep == Keep::states;
    const bool keeps_all = Cell::saved > 0 && layer_.keep == Keep::everything;
    const int64_t kept_row = (keeps_states ? kOthers<Cell> : Cell::saved) * H;
    // Each of these goes on by a row at the end of the loop.
    const T* bias = gate_products_.bias(d, p);
    const S* h_before = h(d, s % 2) + n * P + unit;
    S* h_after = h(d, (s + 1) % 2) + n * P + unit;
    S* y = layer_.y + row * width + d * P + unit;
    S* unprojected = at(unprojected_, state_row * H + unit);
    T* others = at(others_, state_row * kOthers<Cell> * H + unit);
    T* kept = keeps_states || keeps_all ? layer_.reserve + (d * layer_.rows() + row) * kept_row + unit : nullptr;
    T* final_h = layer_.states[0].final + state_row * P + unit;
    for (int64_t i = 0; i < count; ++i) {
      const bool ends = next.of(m + i) == Before::carried;
      for_vectors<T>(units, [&](int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
        V input[Cell::gates], from_h[Cell::gates], state[Cell::states], save[Cell::saved + 1];
        GatesOf::parts(gates, recurrent, bias, u, lanes, input, from_h);
        state[0] = Cell::uses_previous_h ? load(h_before + u, lanes) : V{};
#pragma GCC unroll 8
        for (int64_t k = 0; k < kOthers<Cell>; ++k) {
          state[k + 1] = load(others + k * H + u, lanes);
          if (keeps_states) store(kept + k * H + u, state[k + 1], lanes);
        }
        Cell::forward(input, from_h, state, save);
        if (keeps_all) {
#pragma GCC unroll 8
          for (int64_t k = 0; k < Cell::saved; ++k) store(kept + k * H + u, save[k], lanes);
        }
#pragma GCC unroll 8
        for (int64_t k = 0; k < kOthers<Cell>; ++k) store(others + k * H + u, state[k + 1], lanes);
        if (unprojected != nullptr) {
          store(unprojected + u, state[0], lanes);
        } else {
          store(h_after + u, state[0], lanes);
          store(y + u, state[0], lanes);
          if (ends) store(final_h + u, state[0], lanes);
        }
      });
      gates += kWidth, recurrent += kWidth, h_before += P, h_after += P, y += width, final_h += P;
      unprojected = at(unprojected, H), others = at(others, kOthers<Cell> * H), kept = at(kept, kept_row);
    }
    for (int64_t k = 0; k < kOthers<Cell>; ++k) {
      const State<T>& state = layer_.states[k + 1];
      const auto after = [&](int64_t i) { return others_ + ((state_row + i) * kOthers<Cell> + k) * H + unit; };
      for (int64_t i = 0; i < count; ++i)
        if (next.of(m + i) == Before::carried) copy_row(after(i), units, state.final + (state_row + i) * H + unit);
      for (int64_t i = 0; state.all != nullptr && i < count; ++i)
        copy_row(after(i), units, state.all + ((row + i) * layer_.directions + d) * H + unit);
    }
  }

  // h = h W_hr^T, the columns in `own`.
  void project_output(const ActiveRows<S>& rows, int64_t s, Range own) {
    const Carry next = rows.before(s + 1);
    const int64_t d = rows.direction, H = layer_.hidden, P = layer_.projected, active = rows.active(s);
    const S* from = unprojected_ + (d * layer_.batch + rows.range.begin) * H;
    alignas(64) T block[kRowBlock * kPanel];
    for (int64_t first = own.begin; first < own.end; first += kPanel) {
      const int64_t columns = min_of(kPanel, P - first);
      for (int64_t m = 0; m < active; m += kRowBlock) {
        const int64_t count = min_of(kRowBlock, active - m);
        gate_products_.project(count, from + m * H, d, first, columns, block);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t n = rows.range.begin + m + i;
          const T* row = block + i * kPanel;
          copy_row(row, columns, h(d, (s + 1) % 2) + n * P + first);
          copy_row(row, columns, layer_.y + ((rows.first(s) + m + i) * layer_.directions + d) * P + first);
          if (next.of(m + i) == Before::carried)
            copy_row(row, columns, layer_.states[0].final + (d * layer_.batch + n) * P + first);
        }
      }
    }
  }

  const Layer<S>& layer_;
  const int64_t ahead_ = cache_sizes().l2 / 4 / int64_t(sizeof(T));  // elements of projected input that a thread keeps
  Arena arena_, packed_;
  GatesOf gate_products_;
  Stop stop_;
  S* h_;            // [D, 2, N, P]: read from one, written to the other
  T* others_;       // [D, N, kOthers, H]: the states other than h
  S* unprojected_;  // [D, N, H], null without a projection
  T* gates_;        // for each thread, and behind them the gathered rows of x
  int64_t gates_size_, gathered_size_;
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
