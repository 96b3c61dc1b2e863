// The GPU's kernels as the code that launches them sees them (register.cpp, stepwise.cpp): names, sizes, launches. No
// torch and no CUDA header.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/carry.h"
#include "cuda/scan.h"

struct CUstream_st;

namespace rnnkit::cuda {

using Stream = CUstream_st*;

enum class Type { bfloat16, half, float32, float64 };

// Null stays null.
inline void* moved(const void* from, int64_t bytes) {
  return from ? static_cast<std::byte*>(const_cast<void*>(from)) + bytes : nullptr;
}

// What is known of a cell by its name; see cells/all.h.
struct CellSizes {
  int gates, states, saved, grads;
  bool uses_h, has_source;

  // V, the values of each row and unit in the reserve.
  int kept(const Scan& scan) const {
    if (scan.keep == Keep::nothing) return 0;
    const int given = uses_h && scan.states[0].expects();  // see keeps_given
    if (scan.keep == Keep::states) return states - 1 + given;
    return saved + given + (scan.normalizes() ? 2 * gates : 0);
  }
  // W, the gradients of each row and unit.
  int columns(const Scan& scan) const { return grads + (scan.normalizes() ? gates + (has_source ? 2 : 0) : 0); }
};
inline CellSizes sizes_of(std::string_view cell) {
#define RNNKIT_SIZES(Cell, name)             \
  static_assert(Cell::states <= kMaxStates); \
  if (cell == name) return {Cell::gates, Cell::states, Cell::saved, Cell::grads, Cell::uses_h, Cell::has_source};
  RNNKIT_CELLS(RNNKIT_SIZES)
#undef RNNKIT_SIZES
  throw std::runtime_error("rnnkit: no such cell: " + std::string(cell));
}

// One persistent kernel of a pass and type. A block has `units` hidden units and multiplies 8 * tiles rows of the batch
// at a time; where the blocks of a slice are a cluster, they exchange through its shared memory.
struct Persistent {
  std::string_view cell;
  bool cluster;
  int units, tiles;
  const void* function;
  int64_t (*shared_bytes)(const PersistentScan& scan);  // shared memory that a block needs
};

template <class S, bool kBackward>
const std::vector<Persistent>& persistent_kernels();

// Each launch returns what went wrong, or an empty string.
std::string launch_persistent(const Persistent& kernel, const PersistentScan& scan, Stream stream);

// Throws what a launch returned, unless that is empty.
inline void check(const std::string& error) {
  if (!error.empty()) throw std::runtime_error("rnnkit: " + error);
}

// A state in one step of one direction: as State has it, from the direction's and the step's first row on.
struct StepState : State {
  // Of Sum<S>, [N, H]: from step to step, forward the state of rows that go on, backward the gradient of all rows that
  // the reverse scan has reached.
  void* value;
};

// One step of one direction, element by element: the cell between two products.
struct Step {
  Carry<int64_t> carry;
  // Rows of the batch that the step changes: the active ones. The backward pass without a projection also changes rows
  // that begin at the step after: the gradient of their initial h arrives now. Its last launch, after step 0: all rows.
  int64_t rows;
  int64_t hidden;
  int64_t stride;  // between rows of arrays [rows, D*H]
  StepState states[kMaxStates];
  void* reserve;  // of Sum<S>, [active, V, H] or null
  int values;     // V
  Keep keep;

  const void* gates;  // of S, [active, gate_stride]: w_ih x, from the direction's first gate on
  int64_t gate_stride;
  const void* recurrent;    // of S, [active, G*H]: w_hh h; null for zeros
  const void *b_ih, *b_hh;  // of S, [G*H] or null
  Norms norms;
  void* h;  // of S, [N, H] or null: the operand of the next product
  // Of S, [N, H] or null: what h is multiplied with in the operand. With a projection, whose result is masked: null.
  const void* operand_mask;

  // Of rows that have this step and its neighbour: whether they are put back between them, see is_reset.
  const bool *resets_before, *resets_after;
  bool projects;  // h here is before its projection: the projected one is put back, and the rule holds for it

  // The backward pass.
  const void* previous_output;  // of S, [before, stride]: h of the step before
  // Of S, [grad_recurrent_rows, H] or null: the gradient of h through w_hh, for the rows of the step after, which are
  // more than the active ones where some begin there. With a projection: the whole gradient of h before its projection,
  // through w_hr, for the active rows.
  const void* grad_recurrent;
  int64_t grad_recurrent_rows;
  GradientRule rule;
  bool cuts_before, cuts_after;  // whether the rule cuts the boundary to the step before, to the step after
  void* grad_gates;              // of S, [active, grad_gate_stride], from the direction's first on
  int64_t grad_gate_stride;
};

// A step of one direction, or of both at once: as many rows in each.
struct Steps {
  Step of[2];
  int directions;
};
std::string launch_step(std::string_view cell, Type type, bool backward, const Steps& steps, Stream stream);

// Writes h before its projection to `h` [rows, H] of each direction, from its reserve, which has everything.
std::string launch_unprojected(std::string_view cell, Type type, const Steps& steps, Stream stream);

// Matrices of one shape and type: element (row, column) of number n is data[n * next + row * stride + column].
struct Matrices {
  void* data;
  int64_t stride, next;
};

// c [rows, columns] = a [rows, depth] b, `count` of them; b is [depth, columns], or the transpose of `b` [columns, depth].
struct Product {
  Type type;
  bool transposed, precise;
  int64_t rows, columns, depth;
  Matrices a, b, c;
  int count;
};

// blas: torch's handle of cuBLAS for the current stream.
std::string multiply(const Product& product, void* blas);

// sum [rows, width] = a + b, a matrix without data is zeros; of S. The first `masked` rows of a are multiplied with `mask`
// first. The first `passed_back` rows of a are what a step passes back, and the rule holds for them; the boundary is cut
// for the first `stopped` rows.
struct Addition {
  Matrices a, b, sum;
  int64_t rows, width;
  const void* mask;  // of S, [masked, width], or null
  int64_t masked;
  GradientRule rule;
  int64_t passed_back, stopped;
  const bool* resets;  // [passed_back], see is_reset, or null
  void* grad_reset;    // of Sum<S>, [passed_back, width] or null: what these rows pass back is added to it
};
std::string launch_add(Type type, const Addition& addition, Stream stream);

// h [rows, width] of S: rows that are put back get those of `reset` [rows, width], zeros if that is null.
struct PutBack {
  void* h;
  const void* reset;
  const bool* resets;  // [rows], see is_reset
  int64_t rows, width;
};
std::string launch_put_back(Type type, const PutBack& put_back, Stream stream);

}  // namespace rnnkit::cuda
