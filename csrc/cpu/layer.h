// What the torch side (register.cpp) hands to the kernels, which know nothing of torch: one layer, one or two
// directions, as plain pointers. All arrays are contiguous; T is the type computed in, float or double.
#pragma once

#include <cstdint>

namespace rnnkit {

// One direction's weights, and in the backward pass where their gradients go (null: not needed).
template <class T>
struct Direction {
  const T* w_ih;  // [G*H, I]
  const T* w_hh;  // [G*H, P]
  const T* b_ih;  // [G*H] or null
  const T* b_hh;  // [G*H] or null
  const T* w_hr;  // [P, H] or null: no projection, P = H
  T *grad_w_ih, *grad_w_hh, *grad_b_ih, *grad_b_hh, *grad_w_hr;
};

template <class T>
struct Layer {
  int64_t steps, batch, input, hidden, projected, directions;  // T, N, I, H, P, D
  const int64_t* offsets;  // [T + 1]: the row where each step begins; a step's rows do not increase
  Direction<T> direction[2];
  const T* x;           // [rows, I]
  const T* initial[2];  // h_0 [D, N, P], c_0 [D, N, H]; null for zeros

  T* y;         // [rows, D*P]
  T* final[2];  // h_n [D, N, P], c_n [D, N, H]
  T* reserve;   // [D, rows, saved, H], or null: nothing is saved

  // The backward pass reads y and reserve, and:
  const T* grad_y;         // [rows, D*P] or null
  const T* grad_final[2];  // like final, or null
  T* grad_x;               // [rows, I] or null
  T* grad_initial[2];      // like initial, or null

  int threads;  // to use at the most

  int64_t rows() const { return offsets[steps]; }
  int64_t count(int64_t t) const { return offsets[t + 1] - offsets[t]; }
};

// One cell's kernels for one type: how much scratch memory a call needs (in elements of T), and the call.
template <class T>
struct Kernels {
  int64_t (*forward_scratch)(const Layer<T>&);
  void (*forward)(const Layer<T>&, T* scratch);
  int64_t (*backward_scratch)(const Layer<T>&);
  void (*backward)(const Layer<T>&, T* scratch);
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

}  // namespace rnnkit
