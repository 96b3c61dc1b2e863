// The persistent scan: a block keeps its rows of the recurrent weights in shared memory for the whole sequence, and the
// blocks of a direction exchange a vector each step.
//
// What happens between two exchanges is written once, over a Block of device.cuh or host.h. In a step, a warp waits for
// those blocks whose units it multiplies, multiplies its part of the vector with all of its block's rows, and leaves
// partial sums; then each thread adds the warps' sums for its units and rows of the batch and runs the cell. The part of
// the next exchange is written first of all results, since the others wait for it.
//
// Exchanges are numbered from 0 and lie in two buffers in turn. Exchange e overwrites e - 2: a block writes e after all
// its warps waited for e - 1, thus for every block of the direction, each of which had read e - 2 when it wrote e - 1.
#pragma once

#include <algorithm>

#include "cuda/scan.h"

namespace rnnkit::cuda {

// The part of a pass that is the same in both directions of time: who the block is, its weights, products and flags.
// kRows rows of weights; kTiles groups of 8 rows of the batch at a time; kParts as in chunks_of.
template <class Block, class S, int kUnits, int kRows, int kTiles, int kParts>
class Recurrence {
 public:
  static constexpr int kRowBlocks = row_blocks(kRows), kRowTiles = (kRowBlocks + 1) / 2;
  static constexpr int kStride = sum_stride(kTiles), kColumns = 8 * kTiles;
  static constexpr int kItems = (kUnits * kColumns + kThreads - 1) / kThreads;  // (unit, column) pairs of a thread

  RNNKIT_DEVICE Recurrence(const Block& block, const Scan& scan, std::byte* shared) : block_(block), scan_(scan) {
    block_in_slice_ = block.index % scan.blocks;
    const int group = block.index / scan.blocks;
    direction_ = group / scan.slices;
    first_unit_ = int64_t(block_in_slice_) * kUnits;
    first_row_ = int64_t(group % scan.slices) * scan.columns;
    chunks_ = chunks_of<S>(scan.hidden, kParts);
    flags_ = scan.flags + int64_t(group) * scan.blocks * kFlagStride;
    exchanged_ = static_cast<std::byte*>(scan.exchanged) + group * 2 * exchange_bytes();
    weights_ = shared;
    sums_ = reinterpret_cast<float*>(shared + int64_t(kRowBlocks) * chunks_ * kPieceBytes);
    rest_ = sums_ + kWarps * kRowBlocks * 8 * kStride;
  }

  // Calls body(unit in the block, column of the slice, item) for this thread's part of a group of columns.
  template <class Body>
  RNNKIT_DEVICE void each_item(int thread, int group, const Body& body) const {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const int index = thread + item * kThreads;
      const int unit = index % kUnits, column = group * kColumns + index / kUnits;
      if (index < kUnits * kColumns && first_unit_ + unit < scan_.hidden && column < scan_.columns &&
          first_row_ + column < scan_.batch)
        body(unit, column, item);
    }
  }
  RNNKIT_DEVICE int groups() const { return (scan_.tiles() + kTiles - 1) / kTiles; }

  // row_of(r): the row of `matrix`, [.., kParts * H], that the block's row r is; negative: none.
  template <class RowOf>
  RNNKIT_DEVICE void load_weights(int thread, const S* matrix, const RowOf& row_of) const {
    const int64_t width = kParts * scan_.hidden;
    const bool aligned = scan_.hidden % kVector<S> == 0 && uint64_t(matrix) % kVectorBytes == 0;
    for (int index = thread; index < kRowBlocks * chunks_ * 32; index += kThreads) {
      const int lane = index % 32, chunk = index / 32 % chunks_;
      const int64_t row = row_of(index / 32 / chunks_ * 8 + lane / 4);
      const int64_t unit = int64_t(chunk / kParts) * kChunk<S> + lane % 4 * kVector<S>;
      alignas(kVectorBytes) S vector[kVector<S>] = {};
      if (row >= 0 && unit < scan_.hidden) {
        const S* from = matrix + row * width + chunk % kParts * scan_.hidden + unit;
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
      copy_vector(weights_ + int64_t(index) * kVectorBytes, vector);
    }
  }

  // The warp's share of weights x exchange number `exchange`, for a group of columns.
  template <class Warp>
  RNNKIT_DEVICE void product(const Warp& warp, int64_t exchange, int group) const {
    typename Warp::Sums sums[kRowTiles][kTiles];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kTiles; ++n) warp.clear(sums[m][n]);
    const int first = warp.index * chunks_ / kWarps, last = (warp.index + 1) * chunks_ / kWarps;
    if (first < last) {
      const int first_unit = first / kParts * kChunk<S>, last_unit = ((last - 1) / kParts + 1) * kChunk<S> - 1;
      const int last_block = last_unit / kUnits < scan_.blocks ? last_unit / kUnits : scan_.blocks - 1;
      if (group == 0) warp.wait(flags_, first_unit / kUnits, last_block, uint32_t(exchange + 1));
      const std::byte* from = exchanged_ + (exchange & 1) * exchange_bytes();
      constexpr int kAhead = kTiles < 8 ? 4 : kItems < 4 ? 2 : 1;  // chunks whose loads are under way together
      for (int start = first; start < last; start += kAhead) {
        typename Warp::Vector values[kAhead][kTiles];
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            const int tile = group * kTiles + n;
            values[k][n] = start + k < last && tile < scan_.tiles()
                               ? warp.read_exchanged(from + (int64_t(start + k) * scan_.tiles() + tile) * kPieceBytes)
                               : Warp::zero();
          }
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
          if (start + k < last)
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
              const auto upper = warp.read(piece(2 * m, start + k));
              const auto lower = 2 * m + 1 < kRowBlocks ? warp.read(piece(2 * m + 1, start + k)) : Warp::zero();
#pragma unroll
              for (int n = 0; n < kTiles; ++n)
                warp.template multiply_add<S>(sums[m][n], upper, lower, values[k][n], scan_.precise);
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

  // Row `row` of the product for a column of the slice.
  RNNKIT_DEVICE float product_of(int row, int column) const {
    const float* from = sums_ + row * kStride + column % kColumns;
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += from[warp * kRowBlocks * 8 * kStride];
    return sum;
  }

  // Writes part `part` of a unit into exchange number `exchange`.
  RNNKIT_DEVICE void give(int64_t exchange, int unit, int part, int column, S value) const {
    S* to = reinterpret_cast<S*>(exchanged_ + (exchange & 1) * exchange_bytes());
    to[place_of<S>(first_unit_ + unit, part, kParts, column, scan_.tiles())] = operand(value);
  }
  // After sync(): exchange number `exchange` is complete as far as this block goes.
  RNNKIT_DEVICE void release(int64_t exchange) const {
    block_.release(flags_ + block_in_slice_ * kFlagStride, uint32_t(exchange + 1));
  }

  const Block block_;
  const Scan& scan_;
  int direction_, block_in_slice_;
  int64_t first_unit_, first_row_;
  float* rest_;  // shared memory that is left: states and biases

 private:
  RNNKIT_DEVICE int64_t exchange_bytes() const { return int64_t(chunks_) * scan_.tiles() * kPieceBytes; }
  RNNKIT_DEVICE const std::byte* piece(int row_block, int chunk) const {
    return weights_ + (int64_t(row_block) * chunks_ + chunk) * kPieceBytes;
  }
  // As the product reads it: TF32 is rounded here, once, rather than in each product.
  RNNKIT_DEVICE S operand(S value) const {
    if constexpr (std::is_same_v<S, float>)
      return scan_.precise ? value : rounded_to_tf32(value);
    else
      return value;
  }
  static RNNKIT_DEVICE void copy_vector(void* to, const void* from) {
    struct alignas(kVectorBytes) Vector {
      uint64_t words[2];
    };
    *static_cast<Vector*>(to) = *static_cast<const Vector*>(from);
  }

  int chunks_;
  uint32_t* flags_;
  std::byte *weights_, *exchanged_;
  float* sums_;
};

template <class S>
RNNKIT_DEVICE const S* at(const void* array, int64_t index) {
  return static_cast<const S*>(array) + index;
}

// h_t = cell(w_ih x_t, w_hh h_{t-1}); exchange s is h before step s.
template <class Block, class Cell_, class S_, int kUnits_, int kTiles_>
class ForwardScan {
 public:
  using Cell = Cell_;
  using S = S_;
  static constexpr int kUnits = kUnits_, kTiles = kTiles_, kGates = Cell::gates, kStates = Cell::states;
  static constexpr int kRows = kGates * kUnits, kParts = 1, kBiases = 2 * kRows;

  RNNKIT_DEVICE ForwardScan(const Block& block, const Scan& scan, std::byte* shared)
      : block_(block), scan_(scan), recurrence_(block_, scan, shared) {
    direction_ = recurrence_.direction_;
    bias_ = recurrence_.rest_;
    states_ = bias_ + kBiases;
  }

  RNNKIT_DEVICE void begin() {
    block_.threads(registers_, [&](int thread, Registers&) {
      recurrence_.load_weights(thread, static_cast<const S*>(scan_.weight[direction_]), [&](int row) {
        const int64_t unit = recurrence_.first_unit_ + row % kUnits;
        return row < kRows && unit < scan_.hidden ? row / kUnits * scan_.hidden + unit : int64_t(-1);
      });
      for (int row = thread; row < kRows; row += kThreads) {
        const int64_t unit = recurrence_.first_unit_ + row % kUnits;
        const int64_t at_row = row / kUnits * scan_.hidden + unit;
        const void *b_ih = scan_.b_ih[direction_], *b_hh = scan_.b_hh[direction_];
        const bool there = unit < scan_.hidden;
        bias_[row] = there && b_ih ? widened(*at<S>(b_ih, at_row)) : 0;
        bias_[kRows + row] = there && b_hh ? widened(*at<S>(b_hh, at_row)) : 0;
      }
      for (int group = 0; group < recurrence_.groups(); ++group)
        recurrence_.each_item(thread, group, [&](int unit, int column, int) {
#pragma unroll
          for (int k = 0; k < kStates; ++k)
            state(k, unit, column) =
                scan_.initial[k] ? widened(*at<S>(scan_.initial[k], state_at(unit, column))) : 0;
          if (scan_.initial[0]) {  // in both buffers: a row may begin at any step
            recurrence_.give(0, unit, 0, column, narrowed<S>(state(0, unit, column)));
            recurrence_.give(1, unit, 0, column, narrowed<S>(state(0, unit, column)));
          }
        });
    });
    block_.sync();
    if (scan_.initial[0]) recurrence_.release(0);
    prefetch(0, 0);
  }

  RNNKIT_DEVICE void step(int64_t s) {
    const int64_t t = time(s), offset = scan_.offset(t), count = scan_.count(t);
    const bool first = s == 0 && !scan_.initial[0];  // h is zero then, and no block tells
    for (int group = 0; group < recurrence_.groups(); ++group) {
      if (!first) block_.warps([&](const auto& warp) { recurrence_.product(warp, s, group); });
      block_.sync();
      block_.threads(registers_, [&](int thread, Registers& r) {
        recurrence_.each_item(thread, group, [&](int unit, int column, int item) {
          if (recurrence_.first_row_ + column >= count) return;
          float x[kGates], h[kGates], state_of[kStates];
#pragma unroll
          for (int g = 0; g < kGates; ++g) {
            const int row = g * kUnits + unit;
            x[g] = r.x[item][g] + bias_[row];
            h[g] = (first ? 0 : recurrence_.product_of(row, column)) + bias_[kRows + row];
          }
#pragma unroll
          for (int k = 0; k < kStates; ++k) state_of[k] = state(k, unit, column);
#pragma unroll
          for (int k = 1; k < kStates; ++k) r.before[item][k - 1] = state_of[k];
          Cell::forward(x, h, state_of, r.save[item]);
#pragma unroll
          for (int k = 0; k < kStates; ++k) state(k, unit, column) = state_of[k];
          r.h[item] = narrowed<S>(state_of[0]);
          if (s + 1 < scan_.steps) recurrence_.give(s + 1, unit, 0, column, r.h[item]);
        });
      });
      block_.sync();
      if (group + 1 == recurrence_.groups() && s + 1 < scan_.steps) recurrence_.release(s + 1);
      block_.threads(registers_, [&](int thread, Registers& r) {
        recurrence_.each_item(thread, group, [&](int unit, int column, int item) {
          const int64_t n = recurrence_.first_row_ + column;
          if (n < count) keep(offset + n, recurrence_.first_unit_ + unit, r, item);
        });
      });
      const bool last_group = group + 1 == recurrence_.groups();
      if (!last_group || s + 1 < scan_.steps) prefetch(s + last_group, last_group ? 0 : group + 1);
    }
  }

  RNNKIT_DEVICE void end() {
    block_.threads(registers_, [&](int thread, Registers&) {
      for (int group = 0; group < recurrence_.groups(); ++group)
        recurrence_.each_item(thread, group, [&](int unit, int column, int) {
#pragma unroll
          for (int k = 0; k < kStates; ++k)
            static_cast<S*>(scan_.final[k])[state_at(unit, column)] = narrowed<S>(state(k, unit, column));
        });
    });
  }

 private:
  struct Registers {
    using Items = Recurrence<Block, S, kUnits, kRows, kTiles, kParts>;
    float x[Items::kItems][kGates];
    float save[Items::kItems][Cell::saved + 1], before[Items::kItems][kStates];
    S h[Items::kItems];
  };

  RNNKIT_DEVICE int64_t time(int64_t s) const { return direction_ ? scan_.steps - 1 - s : s; }
  RNNKIT_DEVICE float& state(int k, int unit, int column) const {
    return states_[(k * scan_.columns + column) * kUnits + unit];
  }
  RNNKIT_DEVICE int64_t state_at(int unit, int column) const {
    return (direction_ * scan_.batch + recurrence_.first_row_ + column) * scan_.hidden + recurrence_.first_unit_ + unit;
  }

  // The input's part of the gates, long before it is needed.
  RNNKIT_DEVICE void prefetch(int64_t s, int group) {
    const int64_t t = time(s), offset = scan_.offset(t), count = scan_.count(t);
    block_.threads(registers_, [&](int thread, Registers& r) {
      recurrence_.each_item(thread, group, [&](int unit, int column, int item) {
        const int64_t n = recurrence_.first_row_ + column;
        if (n >= count) return;
        const int64_t row = ((offset + n) * scan_.directions + direction_) * kGates * scan_.hidden;
        const S* from = at<S>(scan_.gates, row + recurrence_.first_unit_ + unit);
#pragma unroll
        for (int g = 0; g < kGates; ++g) r.x[item][g] = widened(from[g * scan_.hidden]);
      });
    });
  }

  // Output and what the backward pass is to find.
  RNNKIT_DEVICE void keep(int64_t row, int64_t unit, const Registers& r, int item) const {
    const int64_t hidden = scan_.hidden;
    static_cast<S*>(scan_.output)[(row * scan_.directions + direction_) * hidden + unit] = r.h[item];
    const int64_t of_direction = direction_ * scan_.rows + row;
    if (scan_.keep == Keep::everything) {
      float* to = scan_.reserve + of_direction * Cell::saved * hidden + unit;
#pragma unroll
      for (int k = 0; k < Cell::saved; ++k) to[k * hidden] = r.save[item][k];
    } else if (scan_.keep == Keep::states) {
      float* to = scan_.reserve + of_direction * (kStates - 1) * hidden + unit;
#pragma unroll
      for (int k = 0; k < kStates - 1; ++k) to[k * hidden] = r.before[item][k];
    }
  }

  const Block block_;
  const Scan& scan_;
  Recurrence<Block, S, kUnits, kRows, kTiles, kParts> recurrence_;
  int direction_;
  float *bias_, *states_;
  typename Block::template PerThread<Registers> registers_;
};

// Gradients of the gates at t from those of h_t; exchange s is the recurrent parts' gradients of step s, counted from
// the last step of the sequence.
template <class Block, class Cell_, class S_, int kUnits_, int kTiles_>
class BackwardScan {
 public:
  using Cell = Cell_;
  using S = S_;
  static constexpr int kUnits = kUnits_, kTiles = kTiles_, kGates = Cell::gates, kStates = Cell::states;
  static constexpr int kRows = kUnits, kParts = kGates, kBiases = 0;

  RNNKIT_DEVICE BackwardScan(const Block& block, const Scan& scan, std::byte* shared)
      : block_(block), scan_(scan), recurrence_(block_, scan, shared) {
    direction_ = recurrence_.direction_;
    grads_ = recurrence_.rest_;
  }

  RNNKIT_DEVICE void begin() {
    block_.threads(registers_, [&](int thread, Registers&) {
      recurrence_.load_weights(thread, static_cast<const S*>(scan_.weight[direction_]), [&](int row) {
        const int64_t unit = recurrence_.first_unit_ + row;
        return row < kRows && unit < scan_.hidden ? unit : int64_t(-1);
      });
      for (int group = 0; group < recurrence_.groups(); ++group)
        recurrence_.each_item(thread, group, [&](int unit, int column, int) {
#pragma unroll
          for (int k = 0; k < kStates; ++k)
            grad(k, unit, column) =
                scan_.grad_final[k] ? widened(*at<S>(scan_.grad_final[k], state_at(unit, column))) : 0;
        });
    });
    prefetch(0, 0);
  }

  RNNKIT_DEVICE void step(int64_t s) {
    const int64_t t = time(s), offset = scan_.offset(t), count = scan_.count(t);
    for (int group = 0; group < recurrence_.groups(); ++group) {
      if (s > 0) block_.warps([&](const auto& warp) { recurrence_.product(warp, s - 1, group); });
      block_.sync();
      block_.threads(registers_, [&](int thread, Registers& r) {
        recurrence_.each_item(thread, group, [&](int unit, int column, int item) {
          float grad_state[kStates];
#pragma unroll
          for (int k = 0; k < kStates; ++k) grad_state[k] = grad(k, unit, column);
          if (s > 0) grad_state[0] += recurrence_.product_of(unit, column);
          if (recurrence_.first_row_ + column < count) {
            grad_state[0] += r.grad_y[item];
            Cell::backward(r.save[item], r.h[item], r.previous_h[item], grad_state, r.grads[item]);
          } else {
#pragma unroll
            for (int k = 0; k < Cell::grads; ++k) r.grads[item][k] = 0;
          }
#pragma unroll
          for (int k = 0; k < kStates; ++k) grad(k, unit, column) = grad_state[k];
#pragma unroll
          for (int k = 0; k < kGates; ++k) recurrence_.give(s, unit, k, column, narrowed<S>(r.grads[item][k]));
        });
      });
      block_.sync();
      const bool last_group = group + 1 == recurrence_.groups();
      if (last_group) recurrence_.release(s);
      block_.threads(registers_, [&](int thread, Registers& r) {
        recurrence_.each_item(thread, group, [&](int unit, int column, int item) {
          const int64_t n = recurrence_.first_row_ + column;
          if (n >= count) return;
          const int64_t row = ((offset + n) * scan_.directions + direction_) * Cell::grads * scan_.hidden;
          S* to = static_cast<S*>(scan_.grad_gates) + row + recurrence_.first_unit_ + unit;
#pragma unroll
          for (int k = 0; k < Cell::grads; ++k) to[k * scan_.hidden] = narrowed<S>(r.grads[item][k]);
        });
      });
      if (!last_group || s + 1 < scan_.steps) prefetch(s + last_group, last_group ? 0 : group + 1);
    }
  }

  RNNKIT_DEVICE void end() {
    for (int group = 0; group < recurrence_.groups(); ++group) {
      if (scan_.grad_initial[0])
        block_.warps([&](const auto& warp) { recurrence_.product(warp, scan_.steps - 1, group); });
      block_.sync();
      block_.threads(registers_, [&](int thread, Registers&) {
        recurrence_.each_item(thread, group, [&](int unit, int column, int) {
#pragma unroll
          for (int k = 0; k < kStates; ++k)
            if (scan_.grad_initial[k])
              static_cast<S*>(scan_.grad_initial[k])[state_at(unit, column)] =
                  narrowed<S>(grad(k, unit, column) + (k == 0 ? recurrence_.product_of(unit, column) : 0));
        });
      });
      block_.sync();
    }
  }

 private:
  struct Registers {
    using Items = Recurrence<Block, S, kUnits, kRows, kTiles, kParts>;
    float save[Items::kItems][Cell::saved + 1], h[Items::kItems], previous_h[Items::kItems], grad_y[Items::kItems];
    float grads[Items::kItems][Cell::grads];
  };

  RNNKIT_DEVICE int64_t time(int64_t s) const { return direction_ ? s : scan_.steps - 1 - s; }
  RNNKIT_DEVICE float& grad(int k, int unit, int column) const {
    return grads_[(k * scan_.columns + column) * kUnits + unit];
  }
  RNNKIT_DEVICE int64_t state_at(int unit, int column) const {
    return (direction_ * scan_.batch + recurrence_.first_row_ + column) * scan_.hidden + recurrence_.first_unit_ + unit;
  }

  // What step s reads of the forward pass, long before it is needed.
  RNNKIT_DEVICE void prefetch(int64_t s, int group) {
    const int64_t t = time(s), before = direction_ ? t + 1 : t - 1;
    const int64_t offset = scan_.offset(t), count = scan_.count(t);
    const bool starts = before < 0 || before == scan_.steps;
    const int64_t previous = starts ? 0 : scan_.offset(before), alive = starts ? 0 : scan_.count(before);
    block_.threads(registers_, [&](int thread, Registers& r) {
      recurrence_.each_item(thread, group, [&](int unit, int column, int item) {
        const int64_t n = recurrence_.first_row_ + column, hidden = scan_.hidden;
        if (n >= count) return;
        const int64_t row = offset + n, global_unit = recurrence_.first_unit_ + unit;
        const float* saved = scan_.reserve + (direction_ * scan_.rows + row) * Cell::saved * hidden + global_unit;
#pragma unroll
        for (int k = 0; k < Cell::saved; ++k) r.save[item][k] = saved[k * hidden];
        const auto output_at = [&](int64_t of_row) {
          return (of_row * scan_.directions + direction_) * hidden + global_unit;
        };
        r.grad_y[item] = scan_.grad_output ? widened(*at<S>(scan_.grad_output, output_at(row))) : 0;
        r.h[item] = Cell::uses_h ? widened(*at<S>(scan_.output, output_at(row))) : 0;
        r.previous_h[item] = 0;
        if constexpr (Cell::uses_previous_h) {
          if (n < alive)
            r.previous_h[item] = widened(*at<S>(scan_.output, output_at(previous + n)));
          else if (scan_.initial[0])
            r.previous_h[item] = widened(*at<S>(scan_.initial[0], state_at(unit, column)));
        }
      });
    });
  }

  const Block block_;
  const Scan& scan_;
  Recurrence<Block, S, kUnits, kRows, kTiles, kParts> recurrence_;
  int direction_;
  float* grads_;
  typename Block::template PerThread<Registers> registers_;
};

// Bytes of shared memory that a pass's block needs.
template <class Pass>
int64_t shared_bytes_of(int64_t hidden, int columns) {
  return shared_bytes<typename Pass::S>(hidden, Pass::kRows, Pass::kParts, Pass::kTiles, Pass::kBiases,
                                        Pass::kStates, Pass::kUnits, columns);
}

}  // namespace rnnkit::cuda
