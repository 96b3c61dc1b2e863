// The pointwise part of a registered cell: what a step does with a block of rows and hidden units once the products are
// there. The kernels call it through pointers, so that it may be compiled later, for other instructions than theirs, or
// be an interpreter. This header needs nothing else, and holds only plain pointers and sizes.
#pragma once

#include <cstdint>

namespace rnnkit {

// Values of a block of rows and units: value v of unit u of row i is base[i * row + v * value + u].
template <class T>
struct Block {
  T* base;
  int64_t row, value;
};

// A step of the forward pass. Only the first `units` units of each value are there.
//
// The recurrent parts of a cell's late gates, the last L of R, are not the product of h but of the second operand, a value
// that the step makes of everything else.
template <class T>
struct ForwardBlock {
  int64_t rows, units;
  Block<const T> x, h;                      // [G], [R]: the products x W_ihᵀ and h W_hhᵀ, to which the biases are added
  Block<const T> x_bias, h_bias;            // [G], [R]
  Block<const T> parameters;                // [U]
  Block<const T> previous_h, other_states;  // [1], [S - 1]: the states before the step
  Block<T> states;                          // [S], on return: the states after the step; see Pointwise::operand
  Block<T> saved;                           // on return what the backward pass needs; null: not wanted
};

// A step of the backward pass.
template <class T>
struct BackwardBlock {
  int64_t rows, units;
  Block<const T> saved, parameters;    // as in the forward pass
  Block<const T> h, previous_h;        // [1]: h after and before the step; null unless the cell uses it
  Block<const T> grad_h, grad_others;  // [1], [S - 1]: the gradients of the states after the step
  Block<const T> grad_operand;         // [1]: the gradient of the second operand; null without late gates
  Block<T> result;                     // see Pointwise
  Block<T> grad;  // [W + U], on return: the gradients of the gates, then of the parameters; with late gates [W + U + 1]
};

// A cell's functions for one type. `context` is what was registered with them.
template <class T>
struct Pointwise {
  void (*forward)(const void* context, const ForwardBlock<T>& block);

  // result: on return the gradients of the states before the step [S], without what comes through W_hh times h. The last
  // value of `grad` is the second operand, and the late gates' gradients there are left as they are.
  void (*backward)(const void* context, const BackwardBlock<T>& block);

  // result: on return the whole gradients of the states after the step [S], with what the states of the step pass to
  // one another. Called only if the cell has several states. `grad` is not there.
  void (*grad_states)(const void* context, const BackwardBlock<T>& block);

  // result: on return h after the step before its projection [1]. Null: h cannot be projected. Only saved and
  // parameters are there.
  void (*output)(const void* context, const BackwardBlock<T>& block);

  // The following are called only if the cell has late gates. states: on return the second operand [1]. Of h and h_bias
  // only the other gates' are there.
  void (*operand)(const void* context, const ForwardBlock<T>& block);

  // result: on return the gradients of the late gates [L]. `grad` and grad_operand are not there.
  void (*late_grads)(const void* context, const BackwardBlock<T>& block);
};

// How many functions that are.
constexpr int kFunctions = 6;

}  // namespace rnnkit
