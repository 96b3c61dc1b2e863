// The scan a step at a time: a product by cuBLAS, a kernel for the cell, and where h is projected another product.
#pragma once

#include <string_view>
#include <vector>

#include "cuda/kernels.h"

namespace rnnkit::cuda {

// weight[0] is w_hh [D, G*H, P] of all directions. With a projection all arrays of state 0 are P wide.
struct StepwiseScan : Scan {
  int64_t projected;            // P
  std::vector<int64_t> counts;  // rows of each step
  const void* w_hr;             // of S, [D, P, H] or null
  int64_t gate_stride;          // between rows of gates

  // Scratch.
  void* between;  // of Sum<S>, [states, D, N, H]: StepState::value of each; a forward pass of one step needs none
  // Of S. Forward: w_hh h, [D, N, G*H]. Backward: the gradient of h through w_hh, [D, N, P]. With a projection it
  // begins as the gradient of the final h. A step writes its active rows only: rows that the reverse scan has not
  // reached hold the gradient of their final h, and rows whose first step it has passed hold that of their initial h.
  void* recurrent;
  void* masked;          // of S, [D, N, P], with an operand_mask: h as the next product reads it
  void* unprojected;     // of S, [D, N, H], with a projection: h before it, or its gradient
  void* grad_projected;  // of S, [D, rows, P], with a projection; on return the whole gradient of each projected h
};

// states[0].final is also the operand of the next product, so that each row leaves its last h there; with an operand_mask
// only a projection's h is. blas: torch's handle of cuBLAS for the stream.
void run_stepwise(std::string_view cell, Type type, bool backward, const StepwiseScan& scan, Stream stream, void* blas);

}  // namespace rnnkit::cuda
