// What the torch side (register.cpp) hands to the kernels, which know nothing of torch: one layer, one or two
// directions, as plain pointers. All arrays are contiguous. S is the type of what is multiplied: float, double or
// BFloat16; everything else is of the type Sum<S> that it is computed in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtypes.h"

namespace rnnkit {

// One direction's weights, and in the backward pass where their gradients go (null: not needed).
template <class S>
struct Direction {
  const S* w_ih;       // [G*H, I]
  const S* w_hh;       // [G*H, P]
  const Sum<S>* b_ih;  // [G*H] or null
  const Sum<S>* b_hh;  // [G*H] or null
  const S* w_hr;       // [P, H] or null: no projection, P = H
  Sum<S>*grad_w_ih, *grad_w_hh, *grad_b_ih, *grad_b_hh, *grad_w_hr;
};

// What the forward pass keeps for the backward pass.
enum class Keep {
  nothing,
  states,      // those after the first, before each step; the backward pass computes the gates again
  everything,  // what Cell::saved counts
};

template <class S>
struct Layer {
  using T = Sum<S>;

  int64_t steps, batch, input, hidden, projected, directions;  // T, N, I, H, P, D
  const int64_t* offsets;  // [T + 1]: the row where each step begins; a step's rows do not increase. Null: N rows each
  Direction<S> direction[2];
  const std::byte* packed;  // these weights as Kernels::pack left them, or null
  const S* x;               // [rows, I]
  const T* initial[2];      // h_0 [D, N, P], c_0 [D, N, H]; null for zeros

  S* y;         // [rows, D*P]
  T* final[2];  // h_n [D, N, P], c_n [D, N, H]
  Keep keep;
  T* reserve;  // [D, rows, what is kept, H], or null: nothing is

  // The backward pass reads y and reserve, and:
  const T* grad_y;         // [rows, D*P] or null
  const T* grad_final[2];  // like final, or null
  T* grad_x;               // [rows, I] or null
  T* grad_initial[2];      // like initial, or null

  int threads;  // to use at the most

  // Asks whether the user wants the call to end early; only its own thread asks. Null: nobody does.
  bool (*wants_to_stop)();

  int64_t begin(int64_t t) const { return offsets == nullptr ? t * batch : offsets[t]; }  // the row where step t begins
  int64_t rows() const { return begin(steps); }
  int64_t count(int64_t t) const { return begin(t + 1) - begin(t); }
};

// One cell's kernels for one type: how many bytes of scratch memory a call needs, and the call; and the weights packed
// ahead, for many forward calls.
template <class S>
struct Kernels {
  int64_t (*forward_scratch)(const Layer<S>&);
  void (*forward)(const Layer<S>&, std::byte* scratch);
  int64_t (*backward_scratch)(const Layer<S>&);
  void (*backward)(const Layer<S>&, std::byte* scratch);
  int64_t (*packed_size)(const Layer<S>&);
  void (*pack)(const Layer<S>&, std::byte* packed);
};

// What is built for one CPU capability: a row for each cell in cells/all.h.
struct CellKernels {
  const char* name;
  int64_t gates, states, saved;
  Kernels<float> f32;
  Kernels<double> f64;
};
struct CellTable {
  const CellKernels* begin;
  const CellKernels* end;
};

namespace baseline {
CellTable cells();
}
namespace avx2 {
CellTable cells();
}
namespace avx512 {
CellTable cells();
}
namespace avx512_bf16 {
const Kernels<BFloat16>* bfloat16_cells();  // in the order of the others
}

}  // namespace rnnkit
