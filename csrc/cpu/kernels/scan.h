// What the forward and the backward scan share: the plan by which threads divide a layer, and scratch memory.
#pragma once

#include <cstddef>
#include <vector>

#include "cpu/caches.h"
#include "cpu/gemm.h"
#include "cpu/kernels/carry.h"
#include "cpu/stop.h"

namespace rnnkit::RNNKIT_CAPABILITY {

constexpr int64_t kRowBlock = 64;  // rows of one recurrent product, so that its result stays in L1

// How the recurrence is divided. Directions are independent, and so are rows of the batch: a thread that owns rows
// waits for nobody, but reads all weights. Or the threads of a direction divide its hidden units: each reads its part
// of the weights, and they meet after each step. The plan is the one that is estimated to take the least time.
struct Split {
  int64_t blocks = 1;   // of rows in each direction
  int64_t members = 1;  // threads that divide the units of a direction; 1 if blocks > 1

  template <class S>
  Split(const Layer<S>& layer, int64_t gates, int64_t units, int threads) {
    const int64_t available = (threads + layer.directions - 1) / layer.directions;
    if (available <= 1) return;
    const int64_t panels = (layer.hidden + units - 1) / units, own_panels = (panels + available - 1) / available;
    const double weights = double(gates) * layer.hidden * layer.projected, rows = layer.batch;
    const double alone = cycles_of_step<S>(rows, weights);
    const double by_rows = cycles_of_step<S>((layer.batch + available - 1) / available, weights);
    const bool late = layer.cell != nullptr && layer.cell->late > 0;
    const int meetings =
        1 + (layer.direction[0].w_hr != nullptr ? 1 : 0) + (layer.normalizes() ? 1 : 0) + (late ? 1 : 0);
    const double meeting = kMeeting * threads * meetings;
    // Cycles to read h of the units that other cores wrote: about one for each byte.
    const double from_others = rows * layer.projected * (available - 1) / available * sizeof(S);
    const double by_units = cycles_of_step<S>(rows, weights * own_panels / panels) + meeting + from_others;
    const double worth_waking = 0.9 * alone;
    if (by_rows < worth_waking && (by_rows <= by_units || panels < available))
      blocks = min_of(available, layer.batch);
    else if (by_units < worth_waking && panels >= available)
      members = available;
  }

 private:
  static constexpr double kMeeting = 750;  // cycles that a meeting of all threads costs, for each of them
  static constexpr double kLatency = 4;    // cycles until a multiply-add is done; a core begins two in each cycle
  static constexpr double kFromL2 = 32;    // bytes that a core reads from its L2 in a cycle
  static constexpr double kFromL3 = 8;     // bytes that a core reads from L3 in a cycle

  // A core's cycles for a step that multiplies `rows` rows with so many weights: to multiply and to read them, for the
  // most part at the same time. Of more weights than its L2 holds it finds there what it read last (Sweep).
  template <class S>
  static double cycles_of_step(double rows, double weights) {
    const double wait = 2 * kLatency / sums_at_once(int64_t(rows));
    const double multiplying = weights / Operand<S>::pair / Operand<S>::lanes * rows / 2 * (wait > 1 ? wait : 1);
    const double bytes = weights * sizeof(S), held = cache_sizes().l2 * 0.6;
    const double reading = bytes <= held ? bytes / kFromL2 : held / kFromL2 + (bytes - held) / kFromL3;
    return multiplying > reading ? multiplying + reading / 4 : reading + multiplying / 4;
  }
};

// Whether a thread that reads so many weights in every step finds only some of them in its L2.
template <class S>
bool outgrow_cache(int64_t weights) {
  return weights * int64_t(sizeof(S)) > cache_sizes().l2 / 2;
}

// The order in which a thread goes through its panels at step s: upwards at even steps and downwards at odd ones, so
// that each step begins with the panels that the one before read last.
class Sweep {
 public:
  Sweep(Range panels, int64_t s) : panels_(panels), down_(s % 2 != 0) {}

  int64_t size() const { return panels_.size(); }
  int64_t operator[](int64_t i) const { return down_ ? panels_.end - 1 - i : panels_.begin + i; }
  // The panel after the i-th one; after the last, the last.
  int64_t next(int64_t i) const { return (*this)[i + 1 < size() ? i + 1 : i]; }

 private:
  Range panels_;
  bool down_;
};

// Block `index` of `blocks` of the batch. The batch is cut so that each block has about as many pairs (row, step) in
// the times `times`.
template <class S>
Range row_block(const Layer<S>& layer, Range times, int64_t index, int64_t blocks) {
  if (layer.rows() == layer.steps * layer.batch) return range_of(layer.batch, index, blocks);
  const int64_t total = layer.begin(times.end) - layer.begin(times.begin);
  int64_t ends[2] = {0, layer.batch};  // the last block has the rows that none of these times has
  for (int side = 0; side < 2; ++side) {
    if (index + side == blocks) continue;
    int64_t t = times.end - 1,
            before = 0;  // before: rows of all times that belong to the first `n` of the batch
    int64_t n = 0;
    for (; n < layer.batch && before < total * (index + side) / blocks; ++n) {
      while (t >= times.begin && layer.count(t) <= n) --t;
      before += t + 1 - times.begin;
    }
    ends[side] = n;
  }
  return {ends[0], ends[1]};
}

// One thread's part of a scan: some rows of a direction. Their units are divided among `members` threads, and this is
// number `member` of them. If there are several, all threads meet after each step, also those of the other direction.
template <class S>
struct Partition {
  ActiveRows<S> rows;
  int64_t member, members;
  bool meets;
};

// Calls body(partition) for each of `thread`'s parts of steps begin to end - 1. For another begin and end a thread may
// have other rows.
template <class S, class Body>
void for_partitions(const Layer<S>& layer, int64_t gates, int64_t units, int64_t begin, int64_t end, int thread,
                    int threads, const Body& body) {
  const Split split(layer, gates, units, threads);
  if (split.members > 1) {
    const int64_t d = thread % layer.directions;
    const int64_t members = (threads - d + layer.directions - 1) / layer.directions;
    return body(Partition<S>{{layer, d, {0, layer.batch}}, thread / layer.directions, members, true});
  }
  for (int64_t i = thread; i < layer.directions * split.blocks; i += threads) {
    const int64_t d = i % layer.directions;
    const Range times = layer.reverses(d) ? Range{layer.steps - end, layer.steps - begin} : Range{begin, end};
    body(Partition<S>{{layer, d, row_block(layer, times, i / layer.directions, split.blocks)}, 0, 1, false});
  }
}

// Gives out consecutive parts of scratch memory, null for none; with no memory, counts the bytes that are wanted.
class Arena {
 public:
  explicit Arena(std::byte* base) : base_(base) {}

  template <class E>
  E* take(int64_t count) {
    E* place = base_ == nullptr || count == 0 ? nullptr : reinterpret_cast<E*>(base_ + used_);
    used_ += round_up(count * sizeof(E), 64);
    return place;
  }
  int64_t used() const { return used_; }

 private:
  std::byte* base_;
  int64_t used_ = 0;
};

// base + offset; null stays null.
template <class E>
E* at(E* base, int64_t offset) {
  return base == nullptr ? nullptr : base + offset;
}

// Copies values of one row between types, zeros if `from` is null.
template <class From, class To>
void copy_row(const From* from, int64_t count, To* to) {
  if (from == nullptr)
    std::memset(to, 0, count * sizeof(To));
  else if constexpr (std::is_same_v<From, To>)
    std::memcpy(to, from, count * sizeof(To));
  else
    for (int64_t i = 0; i < count; i += kLanes<Sum<To>>) {
      const int64_t lanes = min_of(kLanes<Sum<To>>, count - i);
      store(to + i, load(from + i, lanes), lanes);
    }
}

// h times Layer::operand_mask, for `count` elements of a row.
template <class T, class S>
void masked(const S* h, const T* mask, int64_t count, S* to) {
  for_vectors<T>(count,
                 [&](int64_t i, auto lanes) { store(to + i, load(h + i, lanes) * load(mask + i, lanes), lanes); });
}

}  // namespace rnnkit::RNNKIT_CAPABILITY
