// What the forward and the backward scan share: the split of a layer over threads, and views of its rows.
#pragma once

#include "cpu/gemm.h"
#include "cpu/layer.h"
#include "cpu/team.h"

namespace rnnkit::RNNKIT_CAPABILITY {

constexpr int64_t kRowBlock = 64;  // rows of one recurrent product, so that its result stays in L1
constexpr int64_t kPanel = 64;     // columns of a panel that is not made of gates
constexpr int64_t kFewSteps = 16;  // up to so many passes over a matrix it is read as it lies, not packed

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// How the recurrence is split. Directions are independent, and so are rows of the batch: a thread that owns rows
// waits for nobody. With too few rows, the threads of a direction share its hidden units and meet after each step.
struct Split {
  int64_t blocks;   // of rows in each direction
  int64_t members;  // threads that share the units of a direction; 1 if blocks > 1

  template <class T>
  Split(const Layer<T>& layer, int64_t gates, int threads) : blocks(1), members(1) {
    const int64_t share_of = (threads + layer.directions - 1) / layer.directions;
    if (share_of <= 1) return;
    const int64_t weights = gates * layer.hidden * layer.projected;
    if (layer.batch / share_of >= kRowsWorthSplitting)
      blocks = share_of;
    else if (layer.batch * weights >= kStepWorthSharing && layer.hidden >= 32 * share_of)
      members = share_of;
    else if (layer.batch >= 2 * share_of)
      blocks = share_of;
  }

  static constexpr int64_t kRowsWorthSplitting = 8;
  static constexpr int64_t kStepWorthSharing = 100'000;  // multiply-adds
};

// One direction of a layer, or some of its rows, in the order in which the forward scan visits the steps.
template <class T>
struct Rows {
  const Layer<T>& layer;
  int64_t direction;
  Range range;  // of the batch

  int64_t step(int64_t s) const { return direction == 0 ? s : layer.steps - 1 - s; }

  // Rows of `range` that are alive at visit s; none after the last.
  int64_t alive(int64_t s) const {
    if (s < 0 || s >= layer.steps) return 0;
    return most(0, least(layer.count(step(s)), range.end) - range.begin);
  }

  // The index in x and y of the range's first row at visit s.
  int64_t first(int64_t s) const { return layer.offsets[step(s)] + range.begin; }

  // h before step t for row n of the batch, or null for zeros.
  const T* previous_h(int64_t t, int64_t n) const {
    const int64_t before = direction == 0 ? t - 1 : t + 1;
    if (before >= 0 && before < layer.steps && n < layer.count(before))
      return layer.y + (layer.offsets[before] + n) * layer.directions * layer.projected + direction * layer.projected;
    if (layer.initial[0] == nullptr) return nullptr;
    return layer.initial[0] + (direction * layer.batch + n) * layer.projected;
  }
};

// Block `index` of `blocks` of the batch, cut so that each has nearly the same number of rows over all steps.
template <class T>
Range row_block(const Layer<T>& layer, int64_t index, int64_t blocks) {
  if (layer.rows() == layer.steps * layer.batch) return share(layer.batch, index, blocks);
  int64_t cuts[2] = {0, 0};
  for (int side = 0; side < 2; ++side) {
    const int64_t wanted = layer.rows() * (index + side) / blocks;
    int64_t t = layer.steps - 1, before = 0;  // before: rows of all steps that belong to the first `n` rows
    int64_t n = 0;
    for (; n < layer.batch && before < wanted; ++n) {
      while (t >= 0 && layer.count(t) <= n) --t;
      before += t + 1;
    }
    cuts[side] = n;
  }
  return {cuts[0], cuts[1]};
}

// Calls work(direction, rows, member, members, meet) for what falls to `thread`; `meet` is where the members wait
// for each other after a step.
template <class T, class Work>
void for_each_share(const Layer<T>& layer, const Split& split, int thread, int threads, Barrier& all,
                    const Work& work) {
  if (split.members > 1) {
    const int64_t d = thread % layer.directions;
    const int64_t members = (threads - d + layer.directions - 1) / layer.directions;
    work(d, Range{0, layer.batch}, thread / layer.directions, members, all);
    return;
  }
  Barrier alone(1);
  for (int64_t i = thread; i < layer.directions * split.blocks; i += threads)
    work(i % layer.directions, row_block(layer, i / layer.directions, split.blocks), 0, 1, alone);
}

// What the scans take for granted of a cell.
template <class Cell>
constexpr bool kFits = Cell::states <= 2 && (Cell::states == 1 || !Cell::uses_previous_h);

// Gives out consecutive parts of a scratch array, null for none; with no array, counts what is wanted.
template <class T>
class Arena {
 public:
  explicit Arena(T* base) : base_(base) {}
  T* take(int64_t count) {
    T* place = base_ == nullptr || count == 0 ? nullptr : base_ + used_;
    used_ += round_up(count, 64);
    return place;
  }
  int64_t used() const { return used_; }

 private:
  T* base_;
  int64_t used_ = 0;
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
