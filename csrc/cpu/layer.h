// What the torch side (register.cpp) hands to the kernels, which know nothing of torch: one layer as plain pointers. All
// arrays are contiguous. S is the type of what is multiplied: float, double or BFloat16; everything else is of the type
// Sum<S> that it is computed in.
//
// A layer has one or two directions, and each has `heads` heads, which share the input and nothing else. A head of a
// direction is a recurrence of its own, just as a direction is: here and in the kernels `direction` is one of these, D
// counts them all, and those that go forward come first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/dtypes.h"
#include "common/states.h"
#include "cpu/registered.h"

namespace rnnkit {

// Layer normalization of one direction, see rnnkit.specs.NORMS, and where the backward pass writes the gradients. ih:
// null without it; c and c_bias: null if the cell has no source (cells/all.h). Gradients: null: not needed.
template <class T>
struct Norms {
  const T *ih, *hh, *c, *c_bias;  // [G*H], [G*H], [H], [H]
  T *grad_ih, *grad_hh, *grad_c, *grad_c_bias;
};

// One direction's weights, and where the backward pass writes their gradients; null: not needed.
template <class S>
struct Direction {
  const S* w_ih;       // [G*H, I], see Layer::multiplies_input
  const S* w_hh;       // [R*H, P], null if R = 0; R is G but for some registered cells
  const Sum<S>* b_ih;  // [G*H] or null
  const Sum<S>* b_hh;  // [R*H] or null
  const S* w_hr;       // [P, H], or null: no projection, P = H
  const Sum<S>* unit;  // [U, H], a registered cell's parameters; null if U = 0
  Sum<S>*grad_w_ih, *grad_w_hh, *grad_b_ih, *grad_b_hh, *grad_w_hr, *grad_unit;
  Norms<Sum<S>> norms;
};

// One state of a cell in all rows of a layer, of type T = Sum<S>. State 0 is h, of width P; the others have width H.
template <class T>
struct State {
  const T* initial;  // [D, N, width]: before a row's first step; null: zeros
  const T* reset;    // like initial: what Layer::reset puts rows back to; null: zeros
  T* final;          // [D, N, width]: after a row's last step
  T* all;            // [rows, D*width]: after each step; null: not asked for. Null for h, which is Layer::y

  // Zoneout: the probability that a unit keeps the state in a step, whatever the cell gives, and where it does; of h 0
  // with a projection. Null: a step gives the expectation.
  T zoneout;
  const bool* kept;  // [rows, D*width]

  bool zones() const { return zoneout > 0; }

  // In the backward pass.
  const T* grad_final;  // like final; null: zeros
  const T* grad_all;    // [rows, D*width], for h the gradient of Layer::y; null: zeros
  T* grad_initial;      // like initial; null: not needed
  T* grad_reset;        // like initial, of `reset`; null: not needed
  T* flow;              // like all: the gradient of the state after each step; null: not asked for
};

// One E for each direction. Two need no memory of their own: few layers have more.
template <class E>
class PerDirection {
 public:
  PerDirection() = default;
  explicit PerDirection(int64_t directions) : more_(directions > 2 ? directions : 0) {}

  E& operator[](int64_t d) { return more_.empty() ? two_[d] : more_[d]; }
  const E& operator[](int64_t d) const { return more_.empty() ? two_[d] : more_[d]; }

 private:
  E two_[2] = {};
  std::vector<E> more_;
};

template <class S>
struct Layer {
  using T = Sum<S>;

  int64_t steps, batch, input, hidden, projected, directions, heads;  // T, N, I, H, P, D and D's heads
  const int64_t* offsets;  // [T + 1]: the row where each step begins; a step's rows do not increase. Null: N rows each
  PerDirection<Direction<S>> direction;
  const std::byte* packed;  // these weights as Kernels::pack left them; null: they are packed in the call
  bool multiplies_input;    // false: the input is the product already
  const S* x;               // [rows, I], or without products [rows, D, G, H]: x W_ihᵀ of each direction
  S* y;                     // [rows, D*P]: h after each step. The backward pass reads it
  State<T> states[kMaxStates];
  Keep keep;
  T* reserve;  // [D, rows, V, H], V as `keep` says; written by the forward and read by the backward pass; null: none
  T* grad_x;   // [rows, I], written by the backward pass; null: not needed

  // What a step passes back, the gradients of the states before it, is clipped to this absolute value, infinity for
  // no limit, and is zero across the boundaries before the times that are multiples of grad_cut, 0 for none.
  T grad_clip;
  int64_t grad_cut;

  // [rows]: whether a row's states are put back to State::reset at the boundary between the time before and its time;
  // null: no row's. A row's first time has no such boundary.
  const bool* reset;

  // [D, N, P]: what h is multiplied with where the recurrent product reads it; null: ones.
  const T* operand_mask;

  int threads;  // at most

  // Whether the user wants the call to end early, asked by the thread that made the call; null: never.
  bool (*wants_to_stop)();

  const RegisteredCell* cell;  // null: a built-in cell

  bool normalizes() const { return direction[0].norms.ih != nullptr; }
  bool reverses(int64_t d) const { return d >= heads; }
  int64_t begin(int64_t t) const { return offsets == nullptr ? t * batch : offsets[t]; }  // the row where step t begins
  int64_t rows() const { return begin(steps); }
  int64_t count(int64_t t) const { return begin(t + 1) - begin(t); }
};

// One cell's kernels for one type. The memory that they are given is aligned to 64 bytes.
template <class S>
struct Kernels {
  // Bytes of scratch memory that a call needs, and the call.
  int64_t (*forward_scratch)(const Layer<S>&);
  void (*forward)(const Layer<S>&, std::byte* scratch);
  int64_t (*backward_scratch)(const Layer<S>&);
  void (*backward)(const Layer<S>&, std::byte* scratch);

  // Weights packed ahead, for many forward calls: how many bytes, packing them, and whether a buffer of that many bytes
  // was packed by these kernels for a layer of these sizes.
  int64_t (*packed_size)(const Layer<S>&);
  void (*pack)(const Layer<S>&, std::byte* packed);
  bool (*check)(const Layer<S>&, const std::byte* packed);
};

// One cell's kernels.
struct KernelsOfCell {
  Kernels<float> f32;
  Kernels<double> f64;
};

// What callers know of a cell: what is built for one instruction set, a row for each cell in cells/all.h, or what was
// registered.
struct CellKernels {
  const char* name;
  int64_t gates, recurrent, states, saved, parameters;  // G, R, S, saved and U, see RegisteredCell
  bool projects;                                        // whether h may be projected
  bool has_source, uses_h;                              // see cells/all.h
  int64_t input_grad[kMaxGates];                        // the gradient column of each gate's input part
  const RegisteredCell* registered;                     // null: a built-in cell
  KernelsOfCell kernels;
};
struct CellTable {
  const CellKernels* begin;
  const CellKernels* end;
};

namespace baseline {
CellTable cells();
KernelsOfCell registered_cells();
}  // namespace baseline
namespace avx2 {
CellTable cells();
KernelsOfCell registered_cells();
}  // namespace avx2
namespace avx512 {
CellTable cells();
KernelsOfCell registered_cells();
}  // namespace avx512
namespace avx512_bf16 {
const Kernels<BFloat16>* bfloat16_cells();  // in the order of the others
}

}  // namespace rnnkit
