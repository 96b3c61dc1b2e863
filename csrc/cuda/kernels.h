// The GPU's kernels as the code that launches them sees them (register.cpp): names, sizes, launches. No torch, and no
// CUDA header but for the stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/scan.h"

struct CUstream_st;

namespace rnnkit::cuda {

using Stream = CUstream_st*;

enum class Type { bfloat16, half, float32, float64 };

// One persistent kernel of a pass and type: of a cell, for blocks of so many hidden units, which multiply so many groups
// of 8 rows of the batch at a time, and where they are a cluster exchange through its shared memory.
struct Persistent {
  std::string_view cell;
  bool cluster;
  int units, tiles;
  const void* function;
  int64_t (*shared_bytes)(int64_t hidden, int columns);
};

const std::vector<Persistent>&forward_kernels(BFloat16), &forward_kernels(Half), &forward_kernels(float);
const std::vector<Persistent>&backward_kernels(BFloat16), &backward_kernels(Half), &backward_kernels(float);

// Each returns what went wrong, or an empty string.
std::string launch_persistent(const Persistent& kernel, const Scan& scan, Stream stream);

// One step of one direction, element by element: the cell between two products. The first `count` rows of the batch are
// alive.
struct Step {
  int64_t count, hidden;
  void* states[2];  // of Sum<S>, [N, H]; in: t - 1, out: t; the first is h before a projection
  void* reserve;    // of Sum<S>, [count, what is kept, H] or null
  Keep keep;

  const void* gates;  // of S, [count, gate_stride]: w_ih x, from the direction's first gate on
  int64_t gate_stride;
  const void* recurrent;    // of S, [count, G*H]: w_hh h; null for zeros
  const void *b_ih, *b_hh;  // of S, [G*H] or null
  void* h;                  // of S, [N, H]: the operand of the next product
  void* output;             // of S, [count, output_stride] or null; the backward pass reads it
  int64_t output_stride;

  // The backward pass.
  const void* previous_output;   // of S, [previous_count, output_stride]: h of the step before
  int64_t previous_count;        // where rows of the batch begin later, they have their initial h
  const void* previous_initial;  // of S, [N, H] or null for zeros
  const void* grad_output;       // of S, [count, grad_output_stride] or null
  int64_t grad_output_stride;
  const void* grad_recurrent;    // of S, [grad_recurrent_count, H]: what comes through the recurrent weights
  int64_t grad_recurrent_count;  // may be more than are alive: the others wait in grad_states
  void* grad_states[2];          // of Sum<S>, [N, H]; in: of t, out: of t - 1 but for what comes through the weights
  void* grad_gates;              // of S, [count, grad_gate_stride], from the direction's first on
  int64_t grad_gate_stride;

  RNNKIT_ANYWHERE int64_t visited() const { return count > grad_recurrent_count ? count : grad_recurrent_count; }
};

// A step of one direction, or of both at once: as many rows in each.
struct Steps {
  Step of[2];
  int directions;
};
std::string launch_step(std::string_view cell, Type type, bool backward, const Steps& steps, Stream stream);

// c [rows, columns] = a [rows, depth] b, all of one type, row by row; b is [depth, columns], or the transpose of
// `b` [columns, depth]. `count` of them, each so many elements after the one before.
struct Product {
  Type type;
  bool transposed, precise;
  int64_t rows, columns, depth;
  const void *a, *b;
  void* c;
  int64_t a_stride, b_stride, c_stride;
  int count;
  int64_t next_a, next_b, next_c;
};

// blas: torch's handle of cuBLAS for the current stream.
std::string multiply(const Product& product, void* blas);

// Rows of some stride.
struct Rows {
  const void* data;
  int64_t stride;
};

// sum [rows, width] = a + b, or a where b is null; of S.
struct Addition {
  Rows a, b;
  void* sum;
  int64_t sum_stride, rows, width;
};
std::string launch_add(Type type, const Addition& addition, Stream stream);

}  // namespace rnnkit::cuda
