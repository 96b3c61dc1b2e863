// The backward pass of one layer, for any cell: the scan in reverse, a chunk of steps at a time. It leaves the gradients
// of the chunk's gates in one matrix, of which the products with x, h and the weights are taken while it is in cache.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cpu/kernels/gates.h"

namespace rnnkit::RNNKIT_CAPABILITY {

template <class Cell, class S>
class Backward {
  using T = Sum<S>;

 public:
  Backward(const Layer<S>& layer, std::byte* scratch)
      : layer_(layer),
        projects_(kCanProject<Cell> && layer.direction[0].w_hr != nullptr),
        recomputes_(layer.keep == Keep::states && Cell::saved > 0),
        pack_recurrent_(kPair > 1 || layer.steps * ((layer.batch + kDotRows - 1) / kDotRows) > kFewSteps ||
                        layer.projected % kLanes<T> != 0),
        pack_input_(kPair > 1 || (layer.rows() + kDotRows - 1) / kDotRows > kFewSteps || layer.input % kLanes<T> != 0),
        chunks_(cut(layer)),
        arena_(scratch),
        recomputed_(layer, recomputes_, recomputes_, false, arena_),
        stop_(layer.wants_to_stop, /*work=*/1e6) {
    const int64_t D = layer.directions, N = layer.batch, H = layer.hidden, P = layer.projected, I = layer.input;
    for (const Chunk& chunk : chunks_)
      for (int64_t d = 0; d < D; ++d) most_rows_ = max_of(most_rows_, round_up(chunk.rows[d].size(), kPair));
    const int64_t R = 2 * D * most_rows_;  // two chunks: the next is begun while this one is multiplied
    grads_ = arena_.take<S>(R * Cell::grads * H);
    grad_h_ = arena_.take<T>(D * N * P);
    grad_others_ = arena_.take<T>(D * N * kOthers<Cell> * H);
    w_hh_ = arena_.take<S>(pack_recurrent_ ? D * Cell::gates * H * round_up(P, kPanel) : 0);
    w_hr_ = arena_.take<S>(projects_ ? D * round_up(P, kPair) * round_up(H, kPanel) : 0);
    w_ih_ = arena_.take<S>(pack_input_ && layer.grad_x != nullptr ? D * Cell::gates * H * round_up(I, kPanel) : 0);
    grad_projected_ = arena_.take<S>(projects_ ? R * P : 0);
    unprojected_ = arena_.take<S>(projects_ ? R * H : 0);
    saved_ = arena_.take<T>(recomputes_ ? D * most_rows_ * Cell::saved * H : 0);
    previous_h_ = arena_.take<S>(recomputes_ ? D * most_rows_ * P : 0);
    initial_h_ = arena_.take<S>(D * N * P);
    operands_x_ = arena_.take<S>(D * most_rows_ * panelled(I));
    operands_h_ = arena_.take<S>(D * most_rows_ * panelled(P));
    operands_u_ = arena_.take<S>(projects_ ? D * most_rows_ * panelled(H) : 0);
    products_ = arena_.take<S>(layer.threads * kDepth * kProductRows);
  }

  int64_t scratch() const { return arena_.used(); }

  void run() {
    parallel(layer_.threads, [&](int thread, int threads, Barrier& all) {
      prepare(thread, threads);
      Barrier alone(1);
      all.wait();
      for (const Chunk& chunk : chunks_) {
        if (stop_.before(chunk.index, thread, threads > 1)) return;
        if (recomputes_) compute_gates(chunk, thread, threads, all);
        for_shares_of(chunk, thread, threads, [&](const Share<S>& own) { scan(chunk, own, own.meets ? all : alone); });
        all.wait();
        pack_operands(chunk, thread, threads);
        all.wait();
        for (int64_t d = 0; d < layer_.directions; ++d) {
          if (d > 0) all.wait();  // both add to grad_x
          input_gradient(chunk, d, thread, threads);
          weight_gradients(chunk, d, thread, threads);
        }
      }
      if (std::all_of(layer_.states, layer_.states + Cell::states, [](auto& s) { return s.grad_initial == nullptr; }))
        return;
      for_shares_of(chunks_.back(), thread, threads,
                    [&](const Share<S>& own) { step_all(chunks_.back(), own, -1, own.meets ? all : alone); });
    });
  }

 private:
  static constexpr int64_t kPair = Operand<S>::pair;
  static constexpr int64_t kProductRows = 96;  // rows of A and depth of a block of the weight gradients' products
  static constexpr int64_t kDepth = 192;       // also the rows of a chunk, if more than one step

  // Visits begin to end - 1 of the forward scan, and the rows of x and y that they are, in each direction.
  struct Chunk {
    int64_t begin, end, index;
    Range rows[2];
  };

  static std::vector<Chunk> cut(const Layer<S>& layer) {
    std::vector<Chunk> chunks;
    const auto rows_of_visits = [&](int64_t begin, int64_t end, int64_t d) -> Range {
      if (d == 0) return {layer.begin(begin), layer.begin(end)};
      return {layer.begin(layer.steps - end), layer.begin(layer.steps - begin)};
    };
    for (int64_t end = layer.steps; end > 0; end = chunks.back().begin) {
      int64_t begin = end - 1;
      while (begin > 0 && rows_of_visits(begin - 1, end, 0).size() <= kDepth &&
             rows_of_visits(begin - 1, end, layer.directions - 1).size() <= kDepth)
        --begin;
      chunks.push_back({begin,
                        end,
                        static_cast<int64_t>(chunks.size()),
                        {rows_of_visits(begin, end, 0), rows_of_visits(begin, end, 1)}});
    }
    return chunks;
  }

  template <class Body>
  void for_shares_of(const Chunk& chunk, int thread, int threads, const Body& body) const {
    for_shares(layer_, Cell::gates, Cell::units, chunk.begin, chunk.end, thread, threads, body);
  }

  // A weight matrix [K, columns] of direction d, packed or as it lies.
  static MatrixB<S> matrix(const S* packed, const S* w, int64_t K, int64_t columns, int64_t d) {
    if (packed == nullptr) return MatrixB<S>::lying(w, columns);
    const int64_t width = round_up(columns, kPanel);
    return MatrixB<S>::packed(packed + d * K * width, K, width);
  }

  void pack(S* packed, const S* w, int64_t K, int64_t columns, int64_t d, int thread, int threads) {
    if (packed == nullptr) return;
    const int64_t width = round_up(columns, kPanel);
    const Range panels = range_of(width / kPanel, thread, threads);
    for (int64_t p = panels.begin; p < panels.end; ++p)
      pack_rows<S>(
          K, min_of(kPanel, columns - p * kPanel), [&](int64_t k) { return w + k * columns + p * kPanel; },
          packed + d * K * width, width, p * kPanel);
  }

  void prepare(int thread, int threads) {
    const int64_t H = layer_.hidden, P = layer_.projected;
    for (int64_t d = 0; d < layer_.directions; ++d) {
      const Direction<S>& weights = layer_.direction[d];
      pack(w_hh_, weights.w_hh, Cell::gates * H, P, d, thread, threads);
      pack(w_ih_, weights.w_ih, Cell::gates * H, layer_.input, d, thread, threads);
      pack(w_hr_, weights.w_hr, P, H, d, thread, threads);
    }
    if (recomputes_) recomputed_.pack(thread, threads);
    start(grad_h_, layer_.states[0].grad_final, P, thread, threads);
    start(initial_h_, layer_.states[0].initial, P, thread, threads);
    const Range rows = range_of(layer_.directions * layer_.batch, thread, threads);
    for (int64_t i = rows.begin; i < rows.end; ++i)
      for (int64_t k = 0; k < kOthers<Cell>; ++k)
        copy_row(at(layer_.states[k + 1].grad_final, i * H), H, grad_others_ + (i * kOthers<Cell> + k) * H);
    if (layer_.grad_x != nullptr && layer_.directions > 1) {  // otherwise it is written, not added to
      const Range own = range_of(layer_.rows() * layer_.input, thread, threads, 64);
      std::memset(layer_.grad_x + own.begin, 0, own.size() * sizeof(T));
    }
  }

  template <class E>
  void start(E* to, const T* from, int64_t width, int thread, int threads) {
    if (to == nullptr) return;
    const Range own = range_of(layer_.directions * layer_.batch * width, thread, threads, 64);
    copy_row(from == nullptr ? nullptr : from + own.begin, own.size(), to + own.begin);
  }

  // What the forward pass would have saved for the chunk's rows, from x, y and the states that were kept.
  void compute_gates(const Chunk& chunk, int thread, int threads, Barrier& all) {
    const int64_t P = layer_.projected, panels = recomputed_.panels();
    for (int64_t d = 0; d < layer_.directions; ++d) {
      const Range own = range_of(chunk.rows[d].size(), thread, threads);
      PreviousH h = previous_rows(chunk, d);
      for (int64_t i = own.begin; i < own.end; ++i) copy_row(h.row(i), P, previous_h_ + (d * most_rows_ + i) * P);
    }
    all.wait();
    const Range tasks = range_of(layer_.directions * panels, thread, threads);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t d = task / panels, p = task % panels, count = chunk.rows[d].size();
      for (int64_t m = 0; m < count; m += kRowBlock) compute_gates(chunk, d, p, m, min_of(kRowBlock, count - m));
    }
    all.wait();
  }

  void compute_gates(const Chunk& chunk, int64_t d, int64_t p, int64_t first, int64_t count) {
    constexpr int64_t width = Gates<Cell, S>::kWidth, units = Gates<Cell, S>::kUnits;
    const int64_t H = layer_.hidden, P = layer_.projected, row = chunk.rows[d].begin + first;
    const S* h = previous_h_ + (d * most_rows_ + first) * P;
    alignas(64) T gates[2][kRowBlock * width];
    recomputed_.input(count, layer_.x + row * layer_.input, d, p, p, gates[0]);
    recomputed_.recurrent(count, h, d, p, p, gates[1]);
    for (int64_t i = 0; i < count; ++i)
      for_vectors<T>(recomputed_.units_in(p), [&](int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
        const int64_t unit = p * units + u;
        Vector<T> x[Cell::gates], from_h[Cell::gates], state[Cell::states], save[Cell::saved + 1];
        recomputed_.parts(gates[0] + i * width, gates[1] + i * width, recomputed_.bias(d, p), u, lanes, x, from_h);
        state[0] = Cell::uses_previous_h ? load(h + i * P + unit, lanes) : Vector<T>{};
        const T* others = layer_.reserve + (d * layer_.rows() + row + i) * kOthers<Cell> * H + unit;
#pragma GCC unroll 8
        for (int64_t k = 0; k < kOthers<Cell>; ++k) state[k + 1] = load(others + k * H, lanes);
        Cell::forward(x, from_h, state, save);
        T* to = saved_ + (d * most_rows_ + first + i) * Cell::saved * H + unit;
#pragma GCC unroll 8
        for (int64_t k = 0; k < Cell::saved; ++k) store(to + k * H, save[k], lanes);
      });
  }

  void scan(const Chunk& chunk, const Share<S>& own, Barrier& meet) {
    for (int64_t s = chunk.end - 1; s >= chunk.begin; --s) step_all(chunk, own, s, meet);
  }

  void step_all(const Chunk& chunk, const Share<S>& share_of, int64_t s, Barrier& meet) {
    const int64_t weights = Cell::gates * layer_.hidden * layer_.projected;
    const bool fetch = w_hh_ != nullptr && outgrow_cache<S>(weights / share_of.members);
    for_panels(layer_.projected, share_of, s, [&](int64_t first, int64_t width, int64_t next) {
      step(chunk, share_of.rows, s, first, width, fetch ? next : first);
    });
    if (projects_) {
      meet.wait();
      for_panels(layer_.hidden, share_of, s, [&](int64_t first, int64_t width, int64_t) {
        step_behind_projection(chunk, share_of.rows, s, first, width);
      });
    }
    meet.wait();
  }

  // Calls body(first, width, first of the next) for the panels of a member's share of the columns; at its ends these are
  // what the cut leaves of them.
  template <class Body>
  static void for_panels(int64_t columns, const Share<S>& share_of, int64_t s, const Body& body) {
    constexpr int64_t grain = 16;
    const Range own = range_of(columns, share_of.member, share_of.members, grain);
    if (own.size() == 0) return;
    const Sweep sweep({own.begin / kPanel, (own.end + kPanel - 1) / kPanel}, s);
    const auto first = [&](int64_t panel) { return max_of(own.begin, panel * kPanel); };
    for (int64_t i = 0; i < sweep.size(); ++i)
      body(first(sweep[i]), min_of(own.end, (sweep[i] + 1) * kPanel) - first(sweep[i]), first(sweep.next(i)));
  }

  // Where a chunk's values of a row begin, of `width` each, in a buffer of two chunks and all directions.
  template <class E>
  E* in_chunk(E* buffer, const Chunk& chunk, int64_t d, int64_t row, int64_t width) const {
    const int64_t place = (chunk.index % 2 * layer_.directions + d) * most_rows_;
    return buffer + (place + row - chunk.rows[d].begin) * width;
  }
  S* gate_grads(const Chunk& chunk, int64_t d, int64_t row) const {
    return in_chunk(grads_, chunk, d, row, Cell::grads * layer_.hidden);
  }

  // Columns first to first + width of the gradient of h between steps s and s + 1: what grad_h_ holds and, of rows that
  // step s + 1 has, the product with its gates' gradients. It belongs to the initial h of rows that begin at s + 1; to
  // the other rows the gradient of y is added, and the cell's backward of step s follows.
  // `next`: the first column of the panel after this one, to be fetched meanwhile; `first`: none.
  void step(const Chunk& chunk, const ActiveRows<S>& rows, int64_t s, int64_t first, int64_t width, int64_t next) {
    const int64_t d = rows.direction, H = layer_.hidden, P = layer_.projected;
    const Carry here = rows.before(s), after_s = rows.before(s + 1);
    const int64_t touched = max_of(here.active, after_s.active);
    const int64_t K = Cell::gates * H, lda = Cell::grads * H;
    const MatrixB<S> w = matrix(w_hh_, layer_.direction[d].w_hh, K, P, d);
    const S* ahead = next != first ? w.column(next).b : nullptr;
    const Chunk& after = s + 1 < chunk.end ? chunk : chunks_[max_of(0, chunk.index - 1)];
    alignas(64) T recurrent[kRowBlock * kPanel];
    for (int64_t m = 0; m < touched; m += kRowBlock) {
      const int64_t count = min_of(kRowBlock, touched - m);
      const int64_t from_after = max_of(0, min_of(count, after_s.active - m));
      if (from_after > 0)
        gemm<S>(from_after, round_up(width, kLanes<T>), K, rows_of(gate_grads(after, d, rows.first(s + 1) + m), lda),
                w.from(0, first), recurrent, kPanel, false, m == 0 ? ahead : nullptr);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t n = rows.range.begin + m + i, state = (d * layer_.batch + n) * P + first;
        const Before before = after_s.of(m + i);
        const T* from_product = before == Before::carried ? nullptr : recurrent + i * kPanel;
        T* grad_h = grad_h_ + state;
        if (before == Before::initial) {
          for_vectors<T>(width, [&](int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
            Vector<T> grad = load(grad_h + u, lanes);
            if (from_product != nullptr) grad += load(from_product + u);
            finish(state + u, first + u, d, n, grad, lanes);
          });
          continue;
        }
        const int64_t row = rows.first(s) + m + i;
        const T* grad_y = at(layer_.states[0].grad_all, (row * layer_.directions + d) * P + first);
        S* grad_projected = projects_ ? in_chunk(grad_projected_, chunk, d, row, P) + first : nullptr;
        const RowOfCell of = projects_ ? RowOfCell{} : row_of_cell(chunk, rows, s, m + i, here);
        if (!projects_) add_grad_all(of, row, d, first, width);
        for_vectors<T>(width, [&](int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
          Vector<T> grad = load(grad_h + u, lanes);
          if (from_product != nullptr) grad += load(from_product + u);
          if (grad_y != nullptr) grad += load(grad_y + u, lanes);
          if (projects_) {
            store(grad_projected + u, grad, lanes);
            store(grad_h + u, Vector<T>{}, lanes);
          } else {
            store(grad_h + u, cell(of, first + u, lanes, grad), lanes);
          }
        });
      }
    }
  }

  // A row's gradients of its initial states.
  template <class Count>
  RNNKIT_INLINE void finish(int64_t state, int64_t unit, int64_t d, int64_t n, Vector<T> grad_h, Count lanes) {
    if (layer_.states[0].grad_initial != nullptr) store(layer_.states[0].grad_initial + state, grad_h, lanes);
    if (!projects_) finish_others(d, n, unit, lanes);
  }
  template <class Count>
  RNNKIT_INLINE void finish_others(int64_t d, int64_t n, int64_t unit, Count lanes) {
    const int64_t H = layer_.hidden, row = d * layer_.batch + n;
    for (int64_t k = 0; k < kOthers<Cell>; ++k)
      if (T* grad_initial = layer_.states[k + 1].grad_initial; grad_initial != nullptr)
        store(grad_initial + row * H + unit, load(grad_others_ + (row * kOthers<Cell> + k) * H + unit, lanes), lanes);
  }

  // The same where h was projected: the gradient of h before the projection, for units first to first + width.
  void step_behind_projection(const Chunk& chunk, const ActiveRows<S>& rows, int64_t s, int64_t first, int64_t width) {
    const int64_t d = rows.direction, H = layer_.hidden, P = layer_.projected;
    const Carry here = rows.before(s), next = rows.before(s + 1);
    const MatrixB<S> w = matrix(w_hr_, nullptr, P, H, d).from(0, first);
    alignas(64) T grads[kRowBlock * kPanel];
    for (int64_t m = 0; m < here.active; m += kRowBlock) {
      const int64_t count = min_of(kRowBlock, here.active - m);
      gemm<S>(count, round_up(width, kLanes<T>), P,
              rows_of(in_chunk(grad_projected_, chunk, d, rows.first(s) + m, P), P), w, grads, kPanel, false);
      for (int64_t i = 0; i < count; ++i) {
        const RowOfCell of = row_of_cell(chunk, rows, s, m + i, here);
        add_grad_all(of, rows.first(s) + m + i, d, first, width);
        for_vectors<T>(width, [&](int64_t u, auto lanes)
                                  RNNKIT_INLINE_LAMBDA { cell(of, first + u, lanes, load(grads + i * kPanel + u)); });
      }
    }
    for (int64_t m = next.continuing; m < next.active; ++m)  // rows that begin at step s + 1
      for_vectors<T>(width, [&](int64_t u, auto lanes) { finish_others(d, rows.range.begin + m, first + u, lanes); });
  }

  // What the cell's backward reads and writes of one row, each from unit 0 on; null: not there.
  struct RowOfCell {
    const T* saved;          // [Cell::saved, H]
    const S *h, *before;     // h after the step, and before it
    T* grad_others;          // [kOthers, H]: in after the step, out before it
    S *grads, *unprojected;  // grads: [Cell::grads, H]
  };
  // `n`: the row in the range.
  RowOfCell row_of_cell(const Chunk& chunk, const ActiveRows<S>& rows, int64_t s, int64_t n, const Carry& carry) const {
    const int64_t d = rows.direction, H = layer_.hidden, row = rows.first(s) + n;
    RowOfCell of{};
    of.saved = recomputes_ ? saved_ + (d * most_rows_ + row - chunk.rows[d].begin) * Cell::saved * H
                           : layer_.reserve + (d * layer_.rows() + row) * Cell::saved * H;
    if (Cell::uses_h) of.h = layer_.y + (row * layer_.directions + d) * H;
    if (Cell::uses_previous_h) of.before = rows.operand(s, n, carry, initial_h_);
    of.grad_others = at(grad_others_, (d * layer_.batch + rows.range.begin + n) * kOthers<Cell> * H);
    of.grads = gate_grads(chunk, d, row);
    if (projects_) of.unprojected = in_chunk(unprojected_, chunk, d, row, H);
    return of;
  }

  // Adds the gradients of the states other than h after this step, for units first to first + width of a row.
  void add_grad_all(const RowOfCell& of, int64_t row, int64_t d, int64_t first, int64_t width) const {
    const int64_t H = layer_.hidden;
    for (int64_t k = 0; k < kOthers<Cell>; ++k) {
      const T* grad_all = at(layer_.states[k + 1].grad_all, (row * layer_.directions + d) * H + first);
      T* sum = of.grad_others + k * H + first;
      if (grad_all == nullptr) continue;
      for_vectors<T>(width, [&](int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
        store(sum + u, load(sum + u, lanes) + load(grad_all + u, lanes), lanes);
      });
    }
  }

  // The cell's backward for some units of a row; returns what it carries to the previous h besides the gates.
  template <class Count>
  RNNKIT_INLINE Vector<T> cell(const RowOfCell& of, int64_t unit, Count lanes, Vector<T> grad_h) const {
    using V = Vector<T>;
    const int64_t H = layer_.hidden;
    V save[Cell::saved + 1], grad_state[Cell::states] = {grad_h}, grad[Cell::grads], h{}, before{};
#pragma GCC unroll 8
    for (int64_t k = 0; k < Cell::saved; ++k) save[k] = load(of.saved + k * H + unit, lanes);
    if constexpr (Cell::uses_h) h = load(of.h + unit, lanes);
    if constexpr (Cell::uses_previous_h) before = load(of.before + unit, lanes);
#pragma GCC unroll 8
    for (int64_t k = 0; k < kOthers<Cell>; ++k) grad_state[k + 1] = load(of.grad_others + k * H + unit, lanes);
    Cell::backward(save, h, before, grad_state, grad);
#pragma GCC unroll 8
    for (int64_t k = 0; k < Cell::grads; ++k) store(of.grads + k * H + unit, grad[k], lanes);
#pragma GCC unroll 8
    for (int64_t k = 0; k < kOthers<Cell>; ++k) store(of.grad_others + k * H + unit, grad_state[k + 1], lanes);
    if (of.unprojected != nullptr) store(of.unprojected + unit, Cell::output(save), lanes);
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
  void input_gradient(const Chunk& chunk, int64_t d, int thread, int threads) {
    if (layer_.grad_x == nullptr) return;
    const int64_t H = layer_.hidden, I = layer_.input, K = Cell::gates * H, lda = Cell::grads * H;
    const int64_t count = chunk.rows[d].size(), blocks = (count + kProductRows - 1) / kProductRows;
    const int64_t panels = (I + kPanel - 1) / kPanel;
    const MatrixB<S> w = matrix(w_ih_, layer_.direction[d].w_ih, K, I, d);
    const bool fetch = w_ih_ != nullptr && outgrow_cache<S>(K * I);
    const Range tasks = range_of(blocks * panels, thread, threads);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const Range rows = range_of(count, task / panels, blocks);
      const int64_t row = chunk.rows[d].begin + rows.begin;
      const int64_t first = task % panels * kPanel, next = (task + 1) % panels * kPanel;
      bool add = layer_.directions > 1;
      for_input_gates([&](int64_t gate, int64_t gates, int64_t column) {
        const int64_t after = gate + gates < Cell::gates ? gate + gates : 0;
        gemm<S>(rows.size(), min_of(kPanel, I - first), gates * H, rows_of(gate_grads(chunk, d, row) + column * H, lda),
                w.from(gate * H, first), layer_.grad_x + row * I + first, I, add,
                fetch ? w.from(after * H, after > 0 ? first : next).column(0).b : nullptr);
        add = true;
      });
    }
  }

  void weight_gradients(const Chunk& chunk, int64_t d, int thread, int threads) {
    const int64_t H = layer_.hidden, P = layer_.projected, I = layer_.input, first = chunk.rows[d].begin;
    const Direction<S>& weights = layer_.direction[d];
    const S* grads = gate_grads(chunk, d, first);
    const Sums of{chunk.index > 0, chunk.rows[d].size(), Cell::grads * H, thread, threads};
    const auto with_x = [&](int64_t gate) {
      return Product{inputs(chunk, d), operand(operands_x_, d, I), I, at(weights.grad_w_ih, gate * H * I),
                     at(weights.grad_b_ih, gate * H)};
    };
    const auto with_h = [&](int64_t gate) {
      return Product{previous_rows(chunk, d), operand(operands_h_, d, P), P, at(weights.grad_w_hh, gate * H * P),
                     at(weights.grad_b_hh, gate * H)};
    };
    // Gates of which both parts have the same gradient go together, for that is then copied and added up once.
    for (int64_t g = 0; g < Cell::gates;) {
      int64_t end = g;
      while (end < Cell::gates && Cell::input_grad[end] == end) ++end;
      if (end > g) {
        products(of, grads + g * H, (end - g) * H, with_x(g), with_h(g));
      } else {
        end = g + 1;
        products(of, grads + Cell::input_grad[g] * H, H, with_x(g));
        products(of, grads + g * H, H, with_h(g));
      }
      g = end;
    }
    if (projects_)
      products({of.add, of.rows, P, thread, threads}, in_chunk(grad_projected_, chunk, d, first, P), P,
               Product{unprojected(chunk, d), operand(operands_u_, d, H), H, weights.grad_w_hr, nullptr});
  }

  // What the gates' gradients are multiplied with: row(r) of the chunk, and the distance between rows r to r + depth, or
  // 0 if they do not lie evenly.
  struct RowsOf {
    const S* base;
    int64_t width;
    const S* row(int64_t r) const { return base + r * width; }
    int64_t distance(int64_t /*r*/, int64_t /*depth*/) const { return width; }
  };
  RowsOf inputs(const Chunk& chunk, int64_t d) const {
    return {layer_.x + chunk.rows[d].begin * layer_.input, layer_.input};
  }
  RowsOf unprojected(const Chunk& chunk, int64_t d) const {
    return {in_chunk(unprojected_, chunk, d, chunk.rows[d].begin, layer_.hidden), layer_.hidden};
  }
  struct PreviousH {
    const Backward& of;
    ActiveRows<S> rows;
    int64_t first, t;  // row 0 of the chunk, and a step near those asked for
    const S* row(int64_t r) {
      r += first;
      while (r < rows.layer.begin(t)) --t;
      while (r >= rows.layer.begin(t + 1)) ++t;
      const int64_t s = rows.time(t);
      return rows.operand(s, r - rows.layer.begin(t), rows.before(s), of.initial_h_);
    }
    // The operands of rows that all continue lie in y, evenly if each step has the same rows.
    int64_t distance(int64_t r, int64_t depth) const {
      const int64_t N = rows.layer.batch, R = rows.layer.rows();
      const bool dense = R == rows.layer.steps * N;
      const bool continuing = rows.direction == 0 ? first + r >= N : first + r + depth <= R - N;
      return dense && continuing ? rows.layer.directions * rows.layer.projected : 0;
    }
  };

  // Of a chunk's rows, beginning the search for a row's step at the chunk.
  PreviousH previous_rows(const Chunk& chunk, int64_t d) const {
    const int64_t t = d == 0 ? chunk.begin : layer_.steps - chunk.end;
    return {*this, {layer_, d, {0, layer_.batch}}, chunk.rows[d].begin, t};
  }

  // Rows of this distance are read as they lie: a block of them is within reach of the first-level TLB.
  static bool is_near(int64_t distance) { return kPair == 1 && distance > 0 && distance * int64_t(sizeof(S)) <= 1024; }
  template <class B>
  static bool lie_well(const B& b, int64_t r, int64_t depth, int64_t columns) {
    return is_near(b.distance(r, depth)) && columns % kLanes<T> == 0;
  }
  static int64_t panelled(int64_t columns) { return round_up(columns, kPanel); }

  // Where the packed operand of direction d begins.
  S* operand(S* operands, int64_t d, int64_t columns) const { return operands + d * most_rows_ * panelled(columns); }

  // Packs what the chunk's gradients are multiplied with, this thread's part, in blocks of kDepth rows.
  void pack_operands(const Chunk& chunk, int thread, int threads) {
    const int64_t I = layer_.input, P = layer_.projected, H = layer_.hidden;
    for (int64_t d = 0; d < layer_.directions; ++d) {
      const int64_t count = chunk.rows[d].size();
      const Direction<S>& weights = layer_.direction[d];
      if (weights.grad_w_ih != nullptr)
        pack_operand(inputs(chunk, d), count, I, operand(operands_x_, d, I), thread, threads);
      if (weights.grad_w_hh != nullptr)
        pack_operand(previous_rows(chunk, d), count, P, operand(operands_h_, d, P), thread, threads);
      if (weights.grad_w_hr != nullptr)
        pack_operand(unprojected(chunk, d), count, H, operand(operands_u_, d, H), thread, threads);
    }
  }

  template <class B>
  static void pack_operand(B b, int64_t rows, int64_t columns, S* to, int thread, int threads) {
    const int64_t panels = panelled(columns) / kPanel, blocks = (rows + kDepth - 1) / kDepth;
    const Range tasks = range_of(blocks * panels, thread, threads);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t r = task / panels * kDepth, n = task % panels * kPanel;
      const int64_t depth = min_of(kDepth, rows - r), K = round_up(depth, kPair);
      if (lie_well(b, r, depth, columns)) continue;
      pack_rows<S>(
          depth, min_of(kPanel, columns - n), [&](int64_t k) { return b.row(r + k) + n; },
          to + r * panelled(columns) + n * K, kPanel, 0);
    }
  }

  // c[M, columns] (+)= the sum over a chunk's rows r of a(r, m) b(r); sums[m] likewise of a(r, m). Null: not needed.
  template <class B>
  struct Product {
    B b;
    const S* packed;
    int64_t columns;
    T *c, *sums;
  };

  // What the products of one chunk have in common: `add` to the sums of earlier chunks, over `rows`; a(r, m) is
  // a[r * lda + m].
  struct Sums {
    bool add;
    int64_t rows, lda;
    int thread, threads;
  };

  // Products with the same a(r, m); each thread has some of the M. Of rows that are far apart, blocks of kDepth are
  // copied, so that the micro-kernel walks packed memory.
  template <class... Products>
  void products(const Sums& of, const S* a, int64_t M, Products... each) {
    const Range own = range_of(M, of.thread, of.threads, 16);
    if (own.size() == 0 || ((each.c == nullptr && each.sums == nullptr) && ...)) return;
    for (T* sums : {each.sums...})
      if (sums != nullptr && !of.add) std::memset(sums + own.begin, 0, own.size() * sizeof(T));
    S* copied = products_ + of.thread * kDepth * kProductRows;
    for (int64_t r = 0; r < of.rows; r += kDepth) {
      const int64_t depth = min_of(kDepth, of.rows - r);
      for (int64_t m = own.begin; m < own.end; m += kProductRows) {
        const int64_t rows = min_of(kProductRows, own.end - m);
        MatrixA<S, true> of_a{a + r * of.lda + m, of.lda};
        if (!is_near(of.lda)) {
          copy_rows<S>(depth, rows, [&](int64_t k) { return a + (r + k) * of.lda + m; }, copied, kProductRows);
          of_a = {copied, kProductRows * kPair};
        }
        add_rows(of_a, round_up(depth, kPair) / kPair, rows, {at(each.sums, m)...});
        (multiply(of_a, rows, r, depth, m, of.add || r > 0, each), ...);
      }
    }
  }

  // One block of a product: rows m to m + rows of c, over the chunk's rows r to r + depth.
  template <class B>
  static void multiply(MatrixA<S, true> a, int64_t rows, int64_t r, int64_t depth, int64_t m, bool add,
                       Product<B>& product) {
    const int64_t N = product.columns, K = round_up(depth, kPair), distance = product.b.distance(r, depth);
    if (product.c == nullptr) return;
    const S* lying = lie_well(product.b, r, depth, N) ? product.b.row(r) : nullptr;
    const S* packed = product.packed + r * panelled(N);
    for (int64_t n = 0; n < N; n += kPanel) {
      const MatrixB<S> b =
          lying != nullptr ? MatrixB<S>::lying(lying + n, distance) : MatrixB<S>::packed(packed + n * K, K, kPanel);
      gemm<S>(rows, min_of(kPanel, N - n), K, a, b, product.c + m * N + n, N, add);
    }
  }

  // each[m] += the sum of a's row m over its pairs, but for those that are null; in four parts and apart from earlier
  // blocks, which keeps rounding errors small.
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

  const Layer<S>& layer_;
  const bool projects_, recomputes_, pack_recurrent_, pack_input_;
  const std::vector<Chunk> chunks_;
  int64_t most_rows_ = 0;  // of a chunk, in one direction
  Arena arena_;
  Gates<Cell, S> recomputed_;
  Stop stop_;
  S* grads_;                                   // [2 chunks, D, rows, Cell::grads, H]
  T *grad_h_, *grad_others_;                   // [D, N, P], [D, N, kOthers, H]: carried from step to step
  S *w_hh_, *w_hr_, *w_ih_;                    // [D, panels, K, kPanel], K = G*H, P, G*H
  S* grad_projected_;                          // [2 chunks, D, rows, P], with a projection
  S* unprojected_;                             // [2 chunks, D, rows, H], with a projection: h before it
  T* saved_;                                   // [D, rows, Cell::saved, H]: of a chunk, if computed again
  S* previous_h_;                              // [D, rows, P]: likewise
  S* initial_h_;                               // [D, N, P]
  S *operands_x_, *operands_h_, *operands_u_;  // [D, rows, I or P or H]: a chunk's, packed for its weight gradients
  S* products_;                                // for each thread: a block of the gates' gradients
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
