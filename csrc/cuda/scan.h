// One layer's scan as the GPU's kernels get it: plain pointers, all arrays contiguous, and how it is cut into blocks.
// The same for the kernels, for the code that launches them and for their host build.
//
// In a persistent scan a block owns `units` hidden units of one direction for `batch_tile` rows of the batch (a slice), for
// the whole sequence. The blocks of one direction and slice exchange a vector each step: h in the forward pass, the
// gradients of the gates in the backward pass. S is the type of what is multiplied; all else is computed in float.
//
// For each row and hidden unit a reserve has V values, as `keep` says, and the backward pass writes W gradients of the
// gates (Cell::grads: G, and 4 for a GRU). Layer normalization adds to both, see layer_norm.h.
#pragma once

#ifndef RNNKIT_CAPABILITY
#define RNNKIT_CAPABILITY scalar
#endif
#define RNNKIT_SCALAR

#include <cstdint>

#include "cells/all.h"
#include "common/states.h"
#include "cuda/carry.h"
#include "cuda/elements.h"

namespace rnnkit::cuda {

using namespace rnnkit::RNNKIT_CAPABILITY;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kFlagStride = 4;                     // words between two blocks' flags: few pollers a cache line
constexpr int kVectorBytes = 16;                   // what a lane loads at once
constexpr int kFragmentBytes = 32 * kVectorBytes;  // what a warp loads at once

template <class S>
constexpr int kVector = kVectorBytes / int(sizeof(S));
// Hidden units in a slab, 64 bytes of k: a fragment is a slab of 8 rows, four vectors each.
template <class S>
constexpr int kSlab = 4 * kVector<S>;

// One state of the cell; state 0 is h. Arrays of S, or null where they are zeros or not asked for.
struct State {
  const void* initial;     // [D, N, H]
  bool initial_is_wide;    // initial is of Sum<S>, as a reserve keeps it; stepwise only
  const void* reset;       // [D, N, H]: what rows are put back to
  void* final;             // [D, N, H]
  void* all;               // [rows, D*H]: the state after each step; h's is the output, which the backward pass reads
  const void* grad_final;  // [D, N, H]
  const void* grad_all;    // [rows, D*H]
  void* grad_initial;      // [D, N, H]
  void* grad_reset;        // of Sum<S>, [D, N, H]: the gradient of reset is added to it
  void* flow;              // of Sum<S>, like all: the gradient of the state after each step

  bool zones;        // whether units keep their old value in some steps
  double zoneout;    // the probability of it
  const bool* kept;  // like all: the units that do; null for the expectation
  RNNKIT_ANYWHERE bool expects() const { return zones && kept == nullptr; }
};

// Weights of one direction's layer normalization, of S. Null: the products with h, the cell's source are not normalized.
struct Norms {
  const void* hh;                    // [G*H]: what the normalized products are multiplied with
  const void *source, *source_bias;  // [H]: what the normalized source is multiplied with, and what is added to it
};

// What every kernel for a scan gets.
struct Scan {
  int64_t steps, batch, hidden, directions;  // T, N, H, D
  int64_t rows;                              // of input and output
  bool precise;                              // float is multiplied as such, not as TF32

  const void* weight[2];  // of S: w_hh [G*H, P]; in the persistent kernels' backward pass its transpose [H, G*H]
  const void *b_ih[2], *b_hh[2];  // of S, [G*H] or null
  const void* gates;              // of S, [rows, D*G*H]: w_ih x, with layer normalization normalized
  Norms norms[2];                 // stepwise only, see layer_norm.h
  State states[kMaxStates];
  const bool* reset;         // [rows] or null: whether a row is put back between the step before, in time, and its own
  bool noisy;                // whether h has an operand_mask, or a state zoneout
  const void* operand_mask;  // of S, [D, N, P] or null: what h is multiplied with where the recurrent product reads it
  void* reserve;             // of Sum<S>, [D, rows, V, H]
  Keep keep;
  void* grad_gates;  // of S, [rows, D*W*H]
  GradientRule rule;

  bool normalizes() const { return norms[0].hh != nullptr; }
};

// A scan in one launch.
struct PersistentScan : Scan {
  const int64_t* offsets;  // [T + 1] row where each step begins; null: dense
  int units;               // hidden units of a block
  int blocks, slices;      // of a direction
  int batch_tile;          // rows of the batch that a block owns

  // Where the blocks are no cluster:
  uint32_t* flags;  // [D, slices, blocks, kFlagStride], zeros: how many exchanges each block has completed
  void* exchanged;  // of S, [D, slices, 2, slabs, batch_tile / 8, 32, kVector], zeros

  RNNKIT_ANYWHERE int64_t offset(int64_t t) const { return offsets ? offsets[t] : t * batch; }
  RNNKIT_ANYWHERE int64_t count(int64_t t) const { return offsets ? offsets[t + 1] - offsets[t] : batch; }
  // Tiles of 8 rows of the batch in a slice; a block multiplies as many of them at a time as its kernel says.
  RNNKIT_ANYWHERE int slice_tiles() const { return batch_tile / 8; }
};

// Slabs of an exchanged vector: of every kSlab units one for each gate that is exchanged, which is 1 in the forward pass
// and G in the backward pass.
RNNKIT_ANYWHERE int slabs_of(int64_t hidden, int64_t element_bytes, int exchange_gates) {
  const int64_t units = 4 * kVectorBytes / element_bytes;
  return int((hidden + units - 1) / units) * exchange_gates;
}
template <class S>
RNNKIT_ANYWHERE int slabs_of(int64_t hidden, int exchange_gates) {
  return slabs_of(hidden, sizeof(S), exchange_gates);
}

// Bytes of an exchange between the blocks of a direction and slice.
template <class Int>
RNNKIT_ANYWHERE Int exchange_bytes_of(Int slabs, Int tiles) {
  return slabs * tiles * kFragmentBytes;
}

// Where a unit's value of one gate lies in an exchange for row n of the slice, in elements. tiles: slice_tiles().
template <class S>
RNNKIT_ANYWHERE int64_t place_of(int64_t unit, int gate, int exchange_gates, int n, int tiles) {
  const int64_t slab = unit / kSlab<S> * exchange_gates + gate;
  const int within = int(unit % kSlab<S>);
  const int lane = n % 8 * 4 + within / kVector<S>;
  return ((slab * tiles + n / 8) * 32 + lane) * kVector<S> + within % kVector<S>;
}

constexpr int row_blocks(int rows) { return (rows + 7) / 8; }
// Floats between two rows of partial sums.
constexpr int sum_stride(int tiles) { return tiles * 8 + 4; }

}  // namespace rnnkit::cuda
