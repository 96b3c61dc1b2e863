// The persistent scan: a block keeps its rows of the recurrent weights in shared memory for the whole sequence, and the
// blocks of a direction and slice exchange a vector each step: through global memory, or, where they are one cluster,
// each into the shared memory of all.
//
// What happens between two exchanges is written once, over a Block of device.cuh or host.h. In a step, a warp waits for
// the blocks whose units it multiplies, multiplies its part of the vector with all of its block's rows, and leaves
// partial sums; then each thread adds the warps' sums for its units and rows of the batch and runs the cell. The part of
// the next exchange is written first of all results, since the others wait for it.
//
// Exchanges are numbered from 0 and lie in two buffers in turn. Exchange e overwrites e - 2, which nobody reads any
// more: a block writes e after its warps have waited for e - 1, thus for every block of its direction and slice, and
// each of these had read all of e - 2 before it published e - 1. In a cluster one barrier an exchange stands for all
// that waiting.
//
// A step is a chain of dependent instructions: hardly anything but latency decides its time. So all places are worked
// out before the first step, and a thread goes from one to the next by constants.
#pragma once

#include <type_traits>

#include "cuda/carry.h"
#include "cuda/noise.h"
#include "cuda/scan.h"

namespace rnnkit::cuda {

template <class S>
RNNKIT_DEVICE const S* at(const void* array, int64_t index) {
  return static_cast<const S*>(array) + index;
}

// The part that the forward and the backward pass share: who the block is, its weights, products and flags.
// kRows: rows of weights; kTiles: tiles of 8 rows of the batch in a group, see kGroup; kExchangeGates: as in slabs_of.
template <class Block, class S, int kUnits, int kRows, int kTiles, int kExchangeGates, bool kCluster>
class Recurrence {
 public:
  static constexpr int kRowBlocks = row_blocks(kRows), kRowTiles = (kRowBlocks + 1) / 2;
  static constexpr int kStride = sum_stride(kTiles), kGroup = 8 * kTiles;
  // A block multiplies kGroup rows of the batch at a time, a group. An item is one unit of one row: in a group a thread
  // has up to kItems, of one unit, in rows kStep apart.
  static constexpr int kItems = (kUnits * kGroup + kThreads - 1) / kThreads, kStep = kThreads / kUnits;
  static_assert(kThreads % kUnits == 0 && kStep % 8 == 0);

  static constexpr int kSums = kWarps * kRowBlocks * 8 * kStride;  // partial sums of a block

  // Where the parts of a block's shared memory begin. The kernel has pointers to them and counts in int. The check of a
  // plan, which may be wrong, counts bytes from 0 in int64_t, so that no number overflows.
  template <class At>
  struct Parts {
    At weights;
    At exchanged, staged;  // in a cluster: two exchanges, and this block's part of the next one
    At sums;               // floats: kSums partial sums, and behind them the states of the pass
  };
  template <class At, class Int>
  static RNNKIT_ANYWHERE Parts<At> parts_of(At at, Int slabs, Int tiles, Int batch_tile) {
    Parts<At> parts{};
    parts.weights = at;
    at += int64_t(kRowBlocks) * slabs * kFragmentBytes;
    if constexpr (kCluster) {
      parts.exchanged = at;
      at += 2 * exchange_bytes_of(slabs, tiles);
      parts.staged = at;
      at += kExchangeGates * batch_tile * kUnits * int(sizeof(S));
    }
    parts.sums = at;
    return parts;
  }

  RNNKIT_DEVICE Recurrence(const Block& block, const PersistentScan& scan, std::byte* shared)
      : block_(block), scan_(scan) {
    block_in_slice_ = block.index % scan.blocks;
    const int team = block.index / scan.blocks;  // the blocks of one direction and slice
    direction_ = team / scan.slices;
    first_unit_ = block_in_slice_ * kUnits;
    first_row_ = int64_t(team % scan.slices) * scan.batch_tile;
    const int64_t rows = scan.batch - first_row_;
    slice_rows_ = rows < scan.batch_tile ? int(rows) : scan.batch_tile;
    slabs_ = slabs_of<S>(scan.hidden, kExchangeGates);
    tiles_ = scan.slice_tiles();
    const auto parts = parts_of(shared, slabs_, tiles_, scan.batch_tile);
    weights_ = parts.weights;
    exchanged_ = parts.exchanged;
    staged_ = parts.staged;
    if constexpr (!kCluster) {
      exchanged_ = static_cast<std::byte*>(scan.exchanged) + int64_t(team) * 2 * exchange_bytes();
      flags_ = scan.flags + int64_t(team) * scan.blocks * kFlagStride;
    }
    sums_ = reinterpret_cast<float*>(parts.sums);
    rest_ = sums_ + kSums;
  }

  // What a thread computes in every step.
  struct Items {
    int unit;    // of the block
    int n;       // first row of the slice; 2^30, more than any slice has, where the unit is beyond H: no items then
    int staged;  // bytes from the beginning of an exchange, or of the staged part, to the first item's value
  };
  RNNKIT_DEVICE Items items_of(int thread) const {
    const int unit = thread % kUnits, n = thread / kUnits;
    const bool there = first_unit_ + unit < scan_.hidden && n < kGroup;
    const int staged =
        kCluster ? n * kUnits + unit : int(place_of<S>(first_unit_ + unit, 0, kExchangeGates, n, tiles_));
    return {unit, there ? n : 1 << 30, staged * int(sizeof(S))};
  }
  // Calls body(item, row of the slice) for a thread's items in group number `group`, if their row is below `active`.
  template <class Body>
  RNNKIT_DEVICE void each_item(const Items& items, int group, int active, const Body& body) const {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const int n = group * kGroup + items.n + item * kStep;
      if (n < active) body(item, n);
    }
  }
  // The same, with code for one item instead of kItems and few registers: for what is rare.
  template <class Body>
  RNNKIT_DEVICE void each_item_in_turn(const Items& items, int group, int active, const Body& body) const {
#pragma unroll 1
    for (int item = 0; item < kItems; ++item) {
      const int n = group * kGroup + items.n + item * kStep;
      if (n < active) body(item, n);
    }
  }
  RNNKIT_DEVICE int groups() const { return tiles_ / kTiles; }
  // Rows of the slice that are among the first `count` rows of the batch.
  RNNKIT_DEVICE int active(int64_t count) const {
    const int64_t rows = count - first_row_;
    return rows < slice_rows_ ? int(rows) : slice_rows_;
  }

  // Zeroes the partial sums, which the first step reads without a product. In a cluster it also zeroes the exchange, and
  // cluster_sync() must follow, since other blocks write into it.
  RNNKIT_DEVICE void clear(int thread) const {
    for (int k = thread; k < kSums; k += kThreads) sums_[k] = 0;
    if constexpr (kCluster) {
      const std::byte* end = reinterpret_cast<const std::byte*>(sums_);
      for (std::byte* at = exchanged_ + thread * 16; at < end; at += kThreads * 16) clear_vector(at);
    }
  }
  RNNKIT_DEVICE void cluster_sync() const {
    if constexpr (kCluster) {
      block_.arrive();
      block_.wait();
    }
  }

  // row_of(r): which row of `matrix`, [.., kExchangeGates * H], is the block's row r; negative: none, zeros.
  template <class RowOf>
  RNNKIT_DEVICE void load_weights(int thread, const S* matrix, const RowOf& row_of) const {
    const int64_t width = kExchangeGates * scan_.hidden;
    const bool aligned = scan_.hidden % kVector<S> == 0 && uint64_t(matrix) % kVectorBytes == 0;
    for (int index = thread; index < kRowBlocks * slabs_ * 32; index += kThreads) {
      const int lane = index % 32, slab = index / 32 % slabs_;
      const int64_t row = row_of(index / 32 / slabs_ * 8 + lane / 4);
      const int64_t unit = int64_t(slab / kExchangeGates) * kSlab<S> + lane % 4 * kVector<S>;
      alignas(kVectorBytes) S vector[kVector<S>] = {};
      if (row >= 0 && unit < scan_.hidden) {
        const S* from = matrix + row * width + slab % kExchangeGates * scan_.hidden + unit;
        if (aligned) {
          copy_vector(vector, from);
        } else {
#pragma unroll
          for (int k = 0; k < kVector<S>; ++k)
            if (unit + k < scan_.hidden) vector[k] = from[k];
        }
#pragma unroll
        for (int k = 0; k < kVector<S>; ++k) vector[k] = operand(vector[k]);
      }
      store_weights(index / 32 / slabs_, slab, lane, vector);
    }
  }

  // Stores a row's four words of a slab in the order in which multiply_add() takes them: of two row blocks the words 0
  // and 1 of both, then the words 2 and 3; of a last row block without a second one its four words.
  RNNKIT_DEVICE void store_weights(int row_block, int slab, int lane, const void* vector) const {
    const uint32_t* words = static_cast<const uint32_t*>(vector);
    std::byte* const to =
        weights_ + (row_block / 2 * 2 * slabs_ + slab * (row_block / 2 < kRowBlocks / 2 ? 2 : 1)) * kFragmentBytes +
        lane * kVectorBytes;
    if (row_block / 2 < kRowBlocks / 2) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        reinterpret_cast<uint32_t*>(to + k / 2 * kFragmentBytes)[k % 2 * 2 + row_block % 2] = words[k];
    } else {
      copy_vector(to, vector);
    }
  }

  // Partial sums of weights x exchange number `exchange`, over the warp's slabs, for a group of rows of the batch.
  template <class Warp>
  RNNKIT_DEVICE void product(const Warp& warp, uint32_t exchange, int group) const {
    typename Warp::Sums sums[kRowTiles][kTiles];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kTiles; ++n) warp.clear(sums[m][n]);
    const int first = warp.index * slabs_ / kWarps, last = (warp.index + 1) * slabs_ / kWarps;
    if (first < last) {
      if (!kCluster && group == 0) {
        const int first_unit = first / kExchangeGates * kSlab<S>,
                  last_unit = ((last - 1) / kExchangeGates + 1) * kSlab<S> - 1;
        const int last_block = last_unit / kUnits < scan_.blocks ? last_unit / kUnits : scan_.blocks - 1;
        warp.wait(flags_, first_unit / kUnits, last_block, exchange + 1);
      }
      const int step = tiles_ * kFragmentBytes, tile_step = 2 * slabs_ * kFragmentBytes;
      const std::byte* from = warp.lanes(exchanged_ + (exchange & 1) * exchange_bytes()) +
                              (first * tiles_ + group * kTiles) * kFragmentBytes;
      const std::byte* weights = warp.lanes(weights_) + 2 * first * kFragmentBytes;
      const std::byte* odd = warp.lanes(weights_) + (kRowBlocks / 2 * 2 * slabs_ + first) * kFragmentBytes;
      constexpr int kAhead = kTiles < 8 ? 4 : kItems < 4 ? 2 : 1;  // slabs whose loads are under way together
      for (int left = last - first; left > 0; left -= kAhead) {
        typename Warp::Vector values[kAhead][kTiles];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          if (k < left)
#pragma unroll
            for (int n = 0; n < kTiles; ++n) values[k][n] = read_exchanged(warp, from + n * kFragmentBytes);
          from += step;
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
          if (k < left) {
            const std::byte* rows = weights;
#pragma unroll
            for (int m = 0; m < kRowBlocks / 2; ++m) {
              const auto words01 = warp.read(rows), words23 = warp.read(rows + kFragmentBytes);
#pragma unroll
              for (int n = 0; n < kTiles; ++n)
                warp.template multiply_add<S>(sums[m][n], words01, words23, values[k][n], scan_.precise);
              rows += tile_step;
            }
            weights += 2 * kFragmentBytes;
            if constexpr (kRowBlocks % 2 == 1) {
              const auto words = warp.read(odd);
#pragma unroll
              for (int n = 0; n < kTiles; ++n)
                warp.template multiply_add<S>(sums[kRowTiles - 1][n], Warp::upper01(words), Warp::upper23(words),
                                              values[k][n], scan_.precise);
              odd += kFragmentBytes;
            }
          }
      }
    }
    float* to = sums_ + warp.index * kRowBlocks * 8 * kStride;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        warp.store(sums[m][n], to + m * 16 * kStride + n * 8, kStride, 2 * m + 1 < kRowBlocks);
  }

  // An item's element of the product, in row kUnits * k + unit: the warps' sums added up.
  RNNKIT_DEVICE float product_of(const Items& items, int k, int item) const {
    const float* from = sums_ + items.unit * kStride + items.n + k * kUnits * kStride + item * kStep;
    float sums[kWarps];
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sums[warp] = from[warp * kRowBlocks * 8 * kStride];
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  }

  // Leaves zero of an item's element of the product.
  RNNKIT_DEVICE void clear_product(const Items& items, int k, int item) const {
    float* const of_warps = sums_ + items.unit * kStride + items.n + k * kUnits * kStride + item * kStep;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) of_warps[warp * kRowBlocks * 8 * kStride] = 0;
  }

  // Writes an item's value of gate k into exchange number `exchange`; in a cluster, where multicast() finds it.
  RNNKIT_DEVICE void stage(uint32_t exchange, const Items& items, int k, int item, int group, S value) const {
    if constexpr (kCluster) {
      std::byte* to =
          staged_ + items.staged + (k * scan_.batch_tile + group * kGroup + item * kStep) * kUnits * int(sizeof(S));
      *reinterpret_cast<S*>(to) = operand(value);
    } else {
      std::byte* to = exchanged_ + (exchange & 1) * exchange_bytes() + items.staged;
      to += (k * tiles_ + group * kTiles + item * (kStep / 8)) * kFragmentBytes;
      *reinterpret_cast<S*>(to) = operand(value);
    }
  }
  // Copies what was staged to every block of the cluster, each warp to some of them. Call after sync().
  RNNKIT_DEVICE void multicast(int thread, uint32_t exchange) const {
    if constexpr (kCluster) {
      constexpr int kOctets = kUnits / kVector<S>;
      std::byte* const to = exchanged_ + (exchange & 1) * exchange_bytes();
      for (int vector = thread % 32; vector < scan_.batch_tile * kOctets; vector += 32) {
        const int n = vector / kOctets, unit = first_unit_ + vector % kOctets * kVector<S>;
        const int slab = unit / kSlab<S> * kExchangeGates;
        if (slab >= slabs_) continue;  // the last block's units beyond those that are exchanged
        std::byte* place =
            to + (slab * tiles_ + n / 8) * kFragmentBytes + (n % 8 * 4 + unit % kSlab<S> / kVector<S>)*kVectorBytes;
        const std::byte* from = staged_ + vector * kVectorBytes;
#pragma unroll
        for (int k = 0; k < kExchangeGates; ++k) {
          const Words words = *reinterpret_cast<const Words*>(from + k * scan_.batch_tile * kUnits * int(sizeof(S)));
          for (int rank = thread / 32; rank < scan_.blocks; rank += kWarps)
            *reinterpret_cast<Words*>(block_.peer(rank, place + k * tiles_ * kFragmentBytes)) = words;
        }
      }
    }
  }
  // Publishes this block's part of an exchange. Call after sync(), and in a cluster after multicast().
  RNNKIT_DEVICE void publish(uint32_t exchange) const {
    if constexpr (kCluster)
      block_.arrive();
    else
      block_.publish(flags_ + block_in_slice_ * kFlagStride, exchange + 1);
  }
  // In a cluster, waits until all blocks have published the exchange. Elsewhere product() waits for those it needs.
  RNNKIT_DEVICE void wait() const {
    if constexpr (kCluster) block_.wait();
  }

  const Block block_;
  const PersistentScan& scan_;
  int direction_, block_in_slice_, first_unit_, slice_rows_;
  int64_t first_row_;
  float* rest_;  // shared memory behind the sums: states

 private:
  RNNKIT_DEVICE int exchange_bytes() const { return exchange_bytes_of(slabs_, tiles_); }
  // A value as products read it: TF32 is rounded here, once, and not in each product.
  RNNKIT_DEVICE S operand(S value) const {
    if constexpr (std::is_same_v<S, float>)
      return scan_.precise ? value : rounded_to_tf32(value);
    else
      return value;
  }
  template <class Warp>
  static RNNKIT_DEVICE auto read_exchanged(const Warp& warp, const std::byte* from) {
    if constexpr (kCluster)
      return warp.read(from);
    else
      return warp.read_exchanged(from);
  }
  struct alignas(kVectorBytes) Words {
    uint64_t words[2];
  };
  static RNNKIT_DEVICE void copy_vector(void* to, const void* from) {
    *static_cast<Words*>(to) = *static_cast<const Words*>(from);
  }
  static RNNKIT_DEVICE void clear_vector(void* to) { *static_cast<Words*>(to) = Words{}; }

  int slabs_, tiles_;  // tiles_: of the whole slice
  uint32_t* flags_ = nullptr;
  std::byte *weights_, *exchanged_, *staged_;
  float* sums_;
};

// In a noisy scan, of a step: where units keep each state, if a mask tells; and what h is multiplied with as an operand.
template <class Cell, class S, int kItems>
struct Noise {
  bool keeps[kItems][Cell::states];
  S mask[kItems];
};
// What a thread holds from step to step. gates, output, reserve: from a step's first row to the thread's first item.
template <class Cell, class S, class Items, int kItems>
struct ForwardRegisters {
  Items items;
  int64_t gates, output, reserve;
  float b_ih[Cell::gates], b_hh[Cell::gates];
  S x[kItems][Cell::gates];  // as it was loaded: to convert it would be to wait for it
  float save[kItems][Cell::saved + 1], before[kItems][Cell::states];
  S h[kItems];
  bool resets[kItems];  // in a scan with resets: whether the row is put back after the step
  Noise<Cell, S, kItems> noise;
};
template <class Cell, class S, class Items, int kItems>
struct BackwardRegisters {
  Items items;
  int64_t gates, output, reserve;
  float values[kItems][Cell::saved > Cell::grads ? Cell::saved : Cell::grads];  // what was saved, then the gradients
  S h[kItems], previous_h[kItems], grad_y[kItems];
  Noise<Cell, S, kItems> noise;
};

// What both passes have: the order of time, each thread's states and registers.
template <class Block, class Cell_, class S_, int kUnits_, int kTiles_, bool kCluster_, bool kBackward>
class Pass {
 public:
  using Cell = Cell_;
  using S = S_;
  static constexpr bool kCluster = kCluster_;
  static constexpr int kUnits = kUnits_, kTiles = kTiles_, kGates = Cell::gates, kStates = Cell::states;
  static constexpr int kRows = (kBackward ? 1 : kGates) * kUnits, kExchangeGates = kBackward ? kGates : 1;
  using Exchange = Recurrence<Block, S, kUnits, kRows, kTiles, kExchangeGates, kCluster>;
  using Items = typename Exchange::Items;
  static constexpr int kItems = Exchange::kItems, kStep = Exchange::kStep, kGroup = Exchange::kGroup;
  using Registers = std::conditional_t<kBackward, BackwardRegisters<Cell, S, Items, kItems>,
                                       ForwardRegisters<Cell, S, Items, kItems>>;

  RNNKIT_DEVICE void enter() {
    block_.threads(registers_, [&](int thread, Registers& r) {
      r.items = exchange_.items_of(thread);
      exchange_.clear(thread);
    });
    exchange_.cluster_sync();
  }

  // Shared memory that a block needs, the states [kStates, batch_tile, kUnits] included.
  static int64_t shared_bytes(const PersistentScan& scan) {
    const int64_t slabs = slabs_of<S>(scan.hidden, kExchangeGates), tiles = scan.slice_tiles(),
                  batch_tile = scan.batch_tile;
    return Exchange::parts_of(int64_t(0), slabs, tiles, batch_tile).sums +
           (Exchange::kSums + kStates * batch_tile * kUnits) * int(sizeof(float));
  }

 protected:
  RNNKIT_DEVICE Pass(const Block& block, const PersistentScan& scan, std::byte* shared)
      : block_(block), scan_(scan), exchange_(block, scan, shared), direction_(exchange_.direction_) {
    backwards_ = (direction_ == 1) != kBackward;
    states_ = exchange_.rest_;
  }

  // A step: the slice's first row among all rows, and how many rows of the slice are active. Without a step: zeros.
  struct Place {
    int64_t row;
    int active;
  };
  RNNKIT_DEVICE int64_t time(int64_t s) const { return backwards_ ? scan_.steps - 1 - s : s; }
  RNNKIT_DEVICE Place place(int64_t s) const {
    if (s >= scan_.steps) return {0, 0};
    const int64_t t = time(s);
    return {scan_.offset(t) + exchange_.first_row_, exchange_.active(scan_.count(t))};
  }

  // A state of an item, or its gradient. Forward, a row that is not active keeps its states. Backward, dh of every row
  // gets the product added: 0 where the row does not have the later step, and what belongs to its initial h where it
  // begins there.
  RNNKIT_DEVICE float& state(int k, const Items& items, int n) const {
    return states_[(k * scan_.batch_tile + n) * kUnits + items.unit];
  }
  RNNKIT_DEVICE int64_t state_at(const Items& items, int n) const {
    return (direction_ * scan_.batch + exchange_.first_row_ + n) * scan_.hidden + exchange_.first_unit_ + items.unit;
  }
  // What a row's state k is put back to.
  RNNKIT_DEVICE S reset_of(int k, const Items& items, int n) const {
    const void* const reset = scan_.states[k].reset;
    return reset ? *at<S>(reset, state_at(items, n)) : S{};
  }
  // In a scan with resets: whether a row is put back between two steps, of which `second` is processed right after
  // `first`.
  RNNKIT_DEVICE bool is_put_back(const Place& first, const Place& second, int n) const {
    const int64_t later = backwards_ ? first.row : second.row;  // in time
    return n < first.active && n < second.active && scan_.reset[later + n];
  }

  // In a scan with an operand_mask: what an item's h is multiplied with.
  RNNKIT_DEVICE S mask_of(const Items& items, int n) const { return *at<S>(scan_.operand_mask, state_at(items, n)); }
  // In a noisy scan. load_keeps() asks where units keep their states at a step, long before it is needed; load_masks()
  // loads the operands' masks, which are the same at all steps, while the block waits for the products' ends.
  RNNKIT_DEVICE void load_keeps(const Place& place, int group) {
    const int64_t wide = scan_.directions * scan_.hidden, row = place.row + group * kGroup;
#pragma unroll
    for (int k = 0; k < kStates; ++k)
      if (scan_.states[k].kept)
        block_.threads(registers_, [&](int, Registers& r) {
          const bool* const from = scan_.states[k].kept + (row * wide + r.output);
          exchange_.each_item(r.items, group, place.active,
                              [&](int item, int) { r.noise.keeps[item][k] = from[item * kStep * wide]; });
        });
  }
  RNNKIT_DEVICE void load_masks(int group, int active) {
    if (!scan_.operand_mask) return;
    block_.threads(registers_, [&](int, Registers& r) {
      exchange_.each_item(r.items, group, active, [&](int item, int n) { r.noise.mask[item] = mask_of(r.items, n); });
    });
  }

  const Block block_;
  const PersistentScan& scan_;
  const Exchange exchange_;
  const int direction_;
  bool backwards_;  // whether times decrease from step to step: in one pass of each direction
  float* states_;
  Place now_, next_;  // next_: of the step processed next; backward, Carry calls it the step before
  typename Block::template PerThread<Registers> registers_;
};

// h_t = cell(w_ih x_t, w_hh h_{t-1}); exchange s is h before step s.
template <class Block, class Cell_, class S_, int kUnits_, int kTiles_, bool kCluster_>
class ForwardScan : public Pass<Block, Cell_, S_, kUnits_, kTiles_, kCluster_, false> {
  using Base = Pass<Block, Cell_, S_, kUnits_, kTiles_, kCluster_, false>;
  using Base::block_, Base::scan_, Base::exchange_, Base::direction_, Base::registers_, Base::now_, Base::next_;
  using Base::mask_of, Base::load_keeps, Base::load_masks;
  using Base::state, Base::state_at, Base::place, Base::reset_of, Base::is_put_back;

 public:
  using Base::kUnits, Base::kGates, Base::kStates, Base::kRows, Base::kItems, Base::kStep, Base::kGroup;
  using typename Base::Cell, typename Base::S, typename Base::Items, typename Base::Place, typename Base::Registers;

  RNNKIT_DEVICE ForwardScan(const Block& block, const PersistentScan& scan, std::byte* shared)
      : Base(block, scan, shared) {}

  RNNKIT_DEVICE void begin() {
    block_.threads(registers_, [&](int thread, Registers& r) {
      exchange_.load_weights(thread, static_cast<const S*>(scan_.weight[direction_]), [&](int row) {
        const int64_t unit = exchange_.first_unit_ + row % kUnits;
        return row < kRows && unit < scan_.hidden ? row / kUnits * scan_.hidden + unit : int64_t(-1);
      });
      const int64_t unit = exchange_.first_unit_ + r.items.unit, hidden = scan_.hidden;
      const bool there = unit < hidden;
      const void *b_ih = scan_.b_ih[direction_], *b_hh = scan_.b_hh[direction_];
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        r.b_ih[g] = there && b_ih ? widened(*at<S>(b_ih, g * hidden + unit)) : 0;
        r.b_hh[g] = there && b_hh ? widened(*at<S>(b_hh, g * hidden + unit)) : 0;
      }
      const int64_t wide = scan_.directions * hidden;
      r.gates = r.items.n * wide * kGates + direction_ * kGates * hidden + unit;
      r.output = r.items.n * wide + direction_ * hidden + unit;
      r.reserve = ((direction_ * scan_.rows + r.items.n) * values()) * hidden + unit;
      for (int group = 0; group < exchange_.groups(); ++group)
        exchange_.each_item(r.items, group, exchange_.slice_rows_, [&](int item, int n) {
#pragma unroll
          for (int k = 0; k < kStates; ++k)
            state(k, r.items, n) =
                scan_.states[k].initial ? widened(*at<S>(scan_.states[k].initial, state_at(r.items, n))) : 0;
          if (scan_.states[0].initial) {  // in both buffers: a row may begin at any step
            const S h = operand_of(narrowed<S>(state(0, r.items, n)), r.items, n);
            exchange_.stage(0, r.items, 0, item, group, h);
            exchange_.stage(1, r.items, 0, item, group, h);
          }
        });
    });
    block_.sync();
    if (scan_.states[0].initial) {
      block_.threads(registers_, [&](int thread, Registers&) {
        exchange_.multicast(thread, 0);
        exchange_.multicast(thread, 1);
      });
      exchange_.publish(0);
    }
    now_ = place(0);
    next_ = place(1);
    prefetch(now_, 0);
  }

  RNNKIT_DEVICE void step(int64_t s) {
    const bool first = s == 0 && !scan_.states[0].initial;  // h is zero, and no block tells; gpu.py always gives an h
    const bool last = s + 1 == scan_.steps;
    const int groups = exchange_.groups();
    for (int group = 0; group < groups; ++group) {
      const bool last_group = group + 1 == groups;
      if (scan_.reset) load_resets(group);
      if (!first && group == 0) exchange_.wait();
      if (!first) block_.warps([&](const auto& warp) { exchange_.product(warp, uint32_t(s), group); });
      if (scan_.noisy) load_masks(group, now_.active);
      block_.sync();
      if (scan_.noisy)
        run_cell<true>(s, group, last);
      else
        run_cell<false>(s, group, last);
      if (scan_.reset) put_back_h(s, group);
      block_.sync();
      if (last_group && !last) {
        block_.threads(registers_, [&](int thread, Registers&) { exchange_.multicast(thread, uint32_t(s + 1)); });
        exchange_.publish(uint32_t(s + 1));
      }
      write_step(group);
      if (scan_.reset) put_back_states(group);
      if (!last_group)
        prefetch(now_, group + 1);
      else if (!last)
        prefetch(next_, 0);
    }
    now_ = next_;
    next_ = place(s + 2);
  }

  RNNKIT_DEVICE void end() {
    block_.threads(registers_, [&](int, Registers& r) {
      for (int group = 0; group < exchange_.groups(); ++group)
        exchange_.each_item(r.items, group, exchange_.slice_rows_, [&](int, int n) {
#pragma unroll
          for (int k = 0; k < kStates; ++k)
            static_cast<S*>(scan_.states[k].final)[state_at(r.items, n)] = narrowed<S>(state(k, r.items, n));
        });
    });
  }

 private:
  // V, the values of each row and unit in the reserve. Of a cell that saves nothing, see keeps_given, h as the cell gave it
  // takes the place behind what is saved.
  RNNKIT_DEVICE int values() const {
    return (scan_.keep == Keep::everything ? Cell::saved : kStates - 1) + keeps_given<Cell>(scan_.states[0]);
  }
  // An item's h as the product reads it.
  RNNKIT_DEVICE S operand_of(S h, const Items& items, int n) const {
    return scan_.operand_mask ? masked(h, mask_of(items, n)) : h;
  }

  // Runs the cell on the sums of a product, and writes the block's part of the next exchange.
  template <bool kNoisy>
  RNNKIT_DEVICE void run_cell(int64_t s, int group, bool last) {
    block_.threads(registers_, [&](int, Registers& r) {
      exchange_.each_item(r.items, group, now_.active, [&](int item, int n) {
        float x[kGates], h[kGates], state_of[kStates];
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          x[g] = widened(r.x[item][g]) + r.b_ih[g];
          h[g] = exchange_.product_of(r.items, g, item) + r.b_hh[g];
        }
#pragma unroll
        for (int k = 0; k < kStates; ++k) state_of[k] = state(k, r.items, n);
#pragma unroll
        for (int k = 1; k < kStates; ++k) r.before[item][k - 1] = state_of[k];
        Cell::forward(x, h, state_of, r.save[item]);
        if constexpr (kNoisy) {
          if (keeps_given<Cell>(scan_.states[0])) r.save[item][Cell::saved] = state_of[0];
#pragma unroll
          for (int k = 0; k < kStates; ++k)
            if (const State& of = scan_.states[k]; of.zones)
              state_of[k] = zoned(of, r.noise.keeps[item][k], state(k, r.items, n), state_of[k]);
        }
#pragma unroll
        for (int k = 0; k < kStates; ++k) state(k, r.items, n) = state_of[k];
        S operand = r.h[item] = narrowed<S>(state_of[0]);
        if (kNoisy && scan_.operand_mask) operand = masked(operand, r.noise.mask[item]);
        if (!last) exchange_.stage(uint32_t(s + 1), r.items, 0, item, group, operand);
      });
    });
  }

  // Loads the input's part of the gates long before it is needed.
  RNNKIT_DEVICE void prefetch(const Place& place, int group) {
    const int64_t hidden = scan_.hidden, wide = scan_.directions * kGates * hidden;
    const S* const of_step = at<S>(scan_.gates, (place.row + group * kGroup) * wide);
    block_.threads(registers_, [&](int, Registers& r) {
      exchange_.each_item(r.items, group, place.active, [&](int item, int) {
        const S* from = of_step + r.gates + item * kStep * wide;
#pragma unroll
        for (int g = 0; g < kGates; ++g) r.x[item][g] = from[g * hidden];
      });
    });
    if (scan_.noisy) load_keeps(place, group);
  }

  // In a scan with resets: load_resets() asks which rows are put back after this step, before the product, which takes
  // longer than the loads. put_back_h() writes their h into the next exchange; put_back_states() their states, once the
  // results of this step are written.
  RNNKIT_DEVICE void load_resets(int group) {
    block_.threads(registers_, [&](int, Registers& r) {
      exchange_.each_item(r.items, group, now_.active,
                          [&](int item, int n) { r.resets[item] = is_put_back(now_, next_, n); });
    });
  }
  RNNKIT_DEVICE void put_back_h(int64_t s, int group) {
    block_.threads(registers_, [&](int, Registers& r) {
      exchange_.each_item(r.items, group, now_.active, [&](int item, int n) {
        if (r.resets[item])
          exchange_.stage(uint32_t(s + 1), r.items, 0, item, group, operand_of(reset_of(0, r.items, n), r.items, n));
      });
    });
  }
  RNNKIT_DEVICE void put_back_states(int group) {
    block_.threads(registers_, [&](int, Registers& r) {
      exchange_.each_item(r.items, group, now_.active, [&](int item, int n) {
        if (r.resets[item])
#pragma unroll
          for (int k = 0; k < kStates; ++k) state(k, r.items, n) = widened(reset_of(k, r.items, n));
      });
    });
  }

  // Writes the output, other states' values if they are asked for, and what the backward pass is to find.
  RNNKIT_DEVICE void write_step(int group) {
    const int64_t hidden = scan_.hidden, row = now_.row + group * kGroup, wide = scan_.directions * hidden;
    const int values = this->values();
    S* const output = static_cast<S*>(scan_.states[0].all) + row * wide;
    float* const reserve = static_cast<float*>(scan_.reserve) + row * values * hidden;
    block_.threads(registers_, [&](int, Registers& r) {
      exchange_.each_item(r.items, group, now_.active, [&](int item, int n) {
        const int64_t output_at = r.output + item * kStep * wide;
        output[output_at] = r.h[item];
#pragma unroll
        for (int k = 1; k < kStates; ++k)
          if (scan_.states[k].all)
            static_cast<S*>(scan_.states[k].all)[row * wide + output_at] = narrowed<S>(state(k, r.items, n));
        float* const to = reserve + r.reserve + item * kStep * values * hidden;
        if (scan_.keep == Keep::everything) {
#pragma unroll
          for (int k = 0; k < Cell::saved; ++k) to[k * hidden] = r.save[item][k];
        } else if (scan_.keep == Keep::states) {
#pragma unroll
          for (int k = 0; k < kStates - 1; ++k) to[k * hidden] = r.before[item][k];
        }
        if (keeps_given<Cell>(scan_.states[0]) && scan_.keep != Keep::nothing) to[0] = r.save[item][Cell::saved];
      });
    });
  }
};

// Gradients of the gates at t from the gradient of h_t. Step 0 is the last step of the direction's forward scan, which
// is time 0 for d = 1. Exchange s is the gradients of the recurrent parts of step s's gates.
template <class Block, class Cell_, class S_, int kUnits_, int kTiles_, bool kCluster_>
class BackwardScan : public Pass<Block, Cell_, S_, kUnits_, kTiles_, kCluster_, true> {
  using Base = Pass<Block, Cell_, S_, kUnits_, kTiles_, kCluster_, true>;
  using Base::block_, Base::scan_, Base::exchange_, Base::direction_, Base::registers_, Base::now_, Base::next_;
  using Base::mask_of, Base::load_keeps, Base::load_masks;
  using Base::state, Base::state_at, Base::place, Base::reset_of, Base::is_put_back;

 public:
  using Base::kUnits, Base::kGates, Base::kStates, Base::kRows, Base::kItems, Base::kStep, Base::kGroup;
  using typename Base::Cell, typename Base::S, typename Base::Items, typename Base::Place, typename Base::Registers;

  RNNKIT_DEVICE BackwardScan(const Block& block, const PersistentScan& scan, std::byte* shared)
      : Base(block, scan, shared) {}

  RNNKIT_DEVICE void begin() {
    block_.threads(registers_, [&](int thread, Registers& r) {
      exchange_.load_weights(thread, static_cast<const S*>(scan_.weight[direction_]), [&](int row) {
        const int64_t unit = exchange_.first_unit_ + row;
        return row < kRows && unit < scan_.hidden ? unit : int64_t(-1);
      });
      const int64_t unit = exchange_.first_unit_ + r.items.unit, hidden = scan_.hidden,
                    wide = scan_.directions * hidden;
      r.gates = r.items.n * wide * Cell::grads + direction_ * Cell::grads * hidden + unit;
      r.output = r.items.n * wide + direction_ * hidden + unit;
      r.reserve = ((direction_ * scan_.rows + r.items.n) * values()) * hidden + unit;
      for (int group = 0; group < exchange_.groups(); ++group)
        exchange_.each_item(r.items, group, exchange_.slice_rows_, [&](int, int n) {
#pragma unroll
          for (int k = 0; k < kStates; ++k)
            state(k, r.items, n) =
                scan_.states[k].grad_final ? widened(*at<S>(scan_.states[k].grad_final, state_at(r.items, n))) : 0;
        });
    });
    now_ = place(0);
    next_ = place(1);
    if (kEarly) second_next_ = place(2);
    if (kEarly) prefetch(now_, next_, 0);
  }

  RNNKIT_DEVICE void step(int64_t s) {
    const bool last = s + 1 == scan_.steps;
    const int groups = exchange_.groups();
    const bool cuts = scan_.rule.cuts(boundary(s)), cuts_next = scan_.rule.cuts(boundary(s + 1));
    const bool stops_next = cuts_next && !scan_.reset;  // with resets sum_reset_others() does it
    for (int group = 0; group < groups; ++group) {
      const bool last_group = group + 1 == groups;
      if (s > 0 && group == 0) exchange_.wait();
      if (s > 0) block_.warps([&](const auto& warp) { exchange_.product(warp, uint32_t(s - 1), group); });
      if (kEarly && scan_.noisy) load_masks(group, exchange_.slice_rows_);
      block_.sync();
      if (scan_.reset && s > 0) sum_reset_h(place(s - 1), group);
      if (!kEarly) prefetch(now_, next_, group);
      if (scan_.noisy)
        run_cell<true>(s, group, cuts, stops_next);
      else
        run_cell<false>(s, group, cuts, stops_next);
      block_.sync();
      if (last_group) {
        block_.threads(registers_, [&](int thread, Registers&) { exchange_.multicast(thread, uint32_t(s)); });
        exchange_.publish(uint32_t(s));
      }
      write_step(group);
      if (scan_.reset) sum_reset_others(group, cuts_next);
      if (kEarly && !last_group)
        prefetch(now_, next_, group + 1);
      else if (kEarly && !last)
        prefetch(next_, second_next_, 0);
    }
    last_active_ = now_.active;
    now_ = next_;
    next_ = kEarly ? second_next_ : place(s + 2);
    if (kEarly) second_next_ = place(s + 3);
  }

  RNNKIT_DEVICE void end() {
    exchange_.wait();  // nobody may leave a cluster while others write to its memory
    for (int group = 0; group < exchange_.groups(); ++group) {
      if (scan_.states[0].grad_initial)
        block_.warps([&](const auto& warp) { exchange_.product(warp, uint32_t(scan_.steps - 1), group); });
      block_.sync();
      block_.threads(registers_, [&](int, Registers& r) {
        exchange_.each_item(r.items, group, exchange_.slice_rows_, [&](int item, int n) {
#pragma unroll
          for (int k = 0; k < kStates; ++k)
            if (scan_.states[k].grad_initial)
              static_cast<S*>(scan_.states[k].grad_initial)[state_at(r.items, n)] = narrowed<S>(
                  k > 0 ? state(k, r.items, n)
                        : scan_.rule.passed_back(state(k, r.items, n) + grad_operand(r.items, item, n), false));
        });
      });
      block_.sync();
    }
  }

 private:
  // Whether a step's loads are under way during the step that is processed before it. A thread with many items has no
  // registers for that, and loads between product and cell.
  static constexpr bool kEarly = kItems < 4;

  // V, the values of each row and unit in the reserve.
  RNNKIT_DEVICE int values() const { return Cell::saved + keeps_given<Cell>(scan_.states[0]); }

  // An item's gradient of h that came through the operand of the product.
  RNNKIT_DEVICE float grad_operand(const Items& items, int item, int n) const {
    const float product = exchange_.product_of(items, 0, item);
    return scan_.operand_mask ? product * widened(mask_of(items, n)) : product;
  }

  // Whether an item keeps its state k at this step.
  RNNKIT_DEVICE bool keeps_of(const Registers& r, int k, int group, int item) const {
    if (kEarly) return r.noise.keeps[item][k];
    const int64_t wide = scan_.directions * scan_.hidden, row = now_.row + group * kGroup;
    return keeps(scan_.states[k], row * wide + r.output + item * kStep * wide);
  }

  // Runs the cell backward on the sums of a product, and writes the block's part of the next exchange. cuts: whether
  // nothing passes back to this step; stops_next: of the states other than h, to the step processed next.
  template <bool kNoisy>
  RNNKIT_DEVICE void run_cell(int64_t s, int group, bool cuts, bool stops_next) {
    block_.threads(registers_, [&](int, Registers& r) {
      exchange_.each_item(r.items, group, exchange_.slice_rows_, [&](int item, int n) {
        float grad_state[kStates];
#pragma unroll
        for (int k = 0; k < kStates; ++k) grad_state[k] = state(k, r.items, n);
        float product = exchange_.product_of(r.items, 0, item);
        if (kNoisy && scan_.operand_mask) product *= widened(kEarly ? r.noise.mask[item] : mask_of(r.items, n));
        grad_state[0] += product;
        if (n < last_active_) grad_state[0] = scan_.rule.passed_back(grad_state[0], cuts && n < now_.active);
        if (n < now_.active) {
          grad_state[0] += widened(r.grad_y[item]);
          run_active<kNoisy>(r, group, item, grad_state);
#pragma unroll
          for (int k = 1; k < kStates; ++k)
            grad_state[k] = scan_.rule.passed_back(grad_state[k], stops_next && n < next_.active);
        } else {
#pragma unroll
          for (int k = 0; k < Cell::grads; ++k) r.values[item][k] = 0;
        }
#pragma unroll
        for (int k = 0; k < kStates; ++k) state(k, r.items, n) = grad_state[k];
#pragma unroll
        for (int k = 0; k < kGates; ++k)
          exchange_.stage(uint32_t(s), r.items, k, item, group, narrowed<S>(r.values[item][k]));
      });
    });
  }

  // Of an active item. grad_state: on entry the gradients of the states after the step, on return of those before it,
  // without what comes through the recurrent weights. r.values: on return the gradients of the gates.
  template <bool kNoisy>
  RNNKIT_DEVICE void run_active(Registers& r, int group, int item, float* grad_state) {
    float given[kStates];  // the gradients of what the cell gave
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      given[k] = grad_state[k];
      if (const State& of = scan_.states[k]; kNoisy && of.zones)
        given[k] = part_of_now(of, keeps_of(r, k, group, item), grad_state[k]);
    }
    if (scan_.states[0].flow) {
      float whole[kStates];
#pragma unroll
      for (int k = 0; k < kStates; ++k) whole[k] = given[k];
      if constexpr (kStates > 1) Cell::grad_states(r.values[item], whole);
      const int64_t wide = scan_.directions * scan_.hidden, row = now_.row + group * kGroup;
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        const State& of = scan_.states[k];
        static_cast<float*>(of.flow)[row * wide + r.output + item * kStep * wide] =
            kNoisy && of.zones ? grad_state[k] : whole[k];
      }
    }
    float h = widened(r.h[item]), grads[Cell::grads];
    if (kNoisy && keeps_given<Cell>(scan_.states[0])) h = r.values[item][0];
    Cell::backward(r.values[item], h, widened(r.previous_h[item]), given, grads);
#pragma unroll
    for (int k = 0; k < Cell::grads; ++k) r.values[item][k] = grads[k];
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      if (const State& of = scan_.states[k]; kNoisy && of.zones)
        given[k] += part_of_old(of, keeps_of(r, k, group, item), grad_state[k]);
      grad_state[k] = given[k];
    }
  }

  // In a scan with resets: where a row is put back, what would pass back is added to the gradients of the states that it
  // is put back to, and zero is left. sum_reset_h() does so for h after this step, whose gradient the product has
  // completed; sum_reset_others() for the other states before this step, and for cuts. step() does the rest as if there
  // were no resets, so that a scan without them has the same code.
  RNNKIT_DEVICE void sum_reset_h(const Place& last, int group) {
    block_.threads(registers_, [&](int, Registers& r) {
      exchange_.each_item_in_turn(r.items, group, now_.active, [&](int item, int n) {
        if (!is_put_back(last, now_, n)) return;
        float& grad = state(0, r.items, n);
        grad = passed_back(0, grad + grad_operand(r.items, item, n), false, true, r.items, n);
        exchange_.clear_product(r.items, 0, item);
      });
    });
  }
  RNNKIT_DEVICE void sum_reset_others(int group, bool cuts_next) {
    block_.threads(registers_, [&](int, Registers& r) {
      exchange_.each_item_in_turn(r.items, group, now_.active, [&](int, int n) {
        const bool is_reset = is_put_back(now_, next_, n);
#pragma unroll
        for (int k = 1; k < kStates; ++k) {
          float& grad = state(k, r.items, n);
          grad = passed_back(k, grad, cuts_next && n < next_.active, is_reset, r.items, n);
        }
      });
    });
  }
  // What passes back of the gradient of an item's state k, see GradientRule.
  RNNKIT_DEVICE float passed_back(int k, float grad, bool stopped, bool is_reset, const Items& items, int n) const {
    float* const grad_reset = static_cast<float*>(scan_.states[k].grad_reset);
    return scan_.rule.passed_back(grad, stopped, is_reset, grad_reset ? grad_reset + state_at(items, n) : nullptr);
  }

  // Called once for each step and group. Loads what the step reads of the forward pass long before it is needed, and
  // adds the incoming gradients of the states other than h to `state`. before: the step before `place`.
  RNNKIT_DEVICE void prefetch(const Place& place, const Place& before, int group) {
    const int64_t hidden = scan_.hidden, wide = scan_.directions * hidden, row = place.row + group * kGroup;
    const int values = this->values();
    const float* const saved = static_cast<const float*>(scan_.reserve) + row * values * hidden;
    const S* const output = at<S>(scan_.states[0].all, row * wide);
    const S* const previous = at<S>(scan_.states[0].all, (before.row + group * kGroup) * wide);
    const S* const grad_output = scan_.states[0].grad_all ? at<S>(scan_.states[0].grad_all, row * wide) : nullptr;
    const Carry<int> carry{place.active, before.active, 0};  // `after` is not asked for
    block_.threads(registers_, [&](int, Registers& r) {
      exchange_.each_item(r.items, group, place.active, [&](int item, int n) {
        const float* from = saved + r.reserve + item * kStep * values * hidden;
#pragma unroll
        for (int k = 0; k < Cell::saved; ++k) r.values[item][k] = from[k * hidden];
        if (keeps_given<Cell>(scan_.states[0])) r.values[item][0] = from[0];
        const int64_t output_at = r.output + item * kStep * wide;
        r.grad_y[item] = grad_output ? grad_output[output_at] : S{};
        r.h[item] = Cell::uses_h ? output[output_at] : S{};
        r.previous_h[item] = S{};
        if constexpr (Cell::uses_previous_h) {
          if (scan_.reset && is_put_back(place, before, n))
            r.previous_h[item] = reset_of(0, r.items, n);
          else if (!carry.begins(n))
            r.previous_h[item] = previous[output_at];
          else if (scan_.states[0].initial)
            r.previous_h[item] = *at<S>(scan_.states[0].initial, state_at(r.items, n));
        }
      });
    });
    if (kEarly && scan_.noisy) load_keeps(place, group);
    add_gradients(place, group);
  }

  // Adds the incoming gradients of the states other than h after a step to what later steps left in `state`. There are
  // none unless these states were outputs of the layer.
  RNNKIT_DEVICE void add_gradients(const Place& place, int group) {
    const int64_t wide = scan_.directions * scan_.hidden, row = place.row + group * kGroup;
#pragma unroll
    for (int k = 1; k < kStates; ++k)
      if (scan_.states[k].grad_all)
        block_.threads(registers_, [&](int, Registers& r) {
          const S* const from = at<S>(scan_.states[k].grad_all, row * wide + r.output);
          exchange_.each_item(r.items, group, place.active,
                              [&](int item, int n) { state(k, r.items, n) += widened(from[item * kStep * wide]); });
        });
  }

  // Writes the gradients of the gates, for the products over all steps.
  RNNKIT_DEVICE void write_step(int group) {
    const int64_t hidden = scan_.hidden, wide = scan_.directions * Cell::grads * hidden;
    S* const of_step = static_cast<S*>(scan_.grad_gates) + (now_.row + group * kGroup) * wide;
    block_.threads(registers_, [&](int, Registers& r) {
      exchange_.each_item(r.items, group, now_.active, [&](int item, int) {
        S* to = of_step + r.gates + item * kStep * wide;
#pragma unroll
        for (int k = 0; k < Cell::grads; ++k) to[k * hidden] = narrowed<S>(r.values[item][k]);
      });
    });
  }

  // The later of the times of steps s - 1 and s, which are counted backward.
  RNNKIT_DEVICE int64_t boundary(int64_t s) const { return direction_ == 0 ? scan_.steps - s : s; }

  Place second_next_;
  int last_active_ = 0;  // rows of the slice that have the step processed last, which passes gradients back to them
};

template <bool kBackward, class Block, class Cell, class S, int kUnits, int kTiles, bool kCluster>
using ScanOf = std::conditional_t<kBackward, BackwardScan<Block, Cell, S, kUnits, kTiles, kCluster>,
                                  ForwardScan<Block, Cell, S, kUnits, kTiles, kCluster>>;

}  // namespace rnnkit::cuda
