// A cell that is not built in: its sizes are known at run time, and its pointwise part is called through pointers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/states.h"
#include "cpu/pointwise.h"

namespace rnnkit {

// The most gates that a cell can have, of its input and of its recurrent product.
constexpr int kMaxGates = 16;

// The most values that a cell can save, and the most parameters that it can have, for each hidden unit.
constexpr int kMaxSaved = 64;

// The most hidden units in a panel of packed weights.
constexpr int kMostUnits = 64;

// The members up to uses_previous_h are those of FixedShape (kernels/shape.h), where a built-in cell has constants.
struct RegisteredCell {
  const char* name;
  int64_t gates, recurrent;  // G, R: input gates and recurrent gates. R = 0: no recurrent product and no W_hh
  int64_t late, early;       // L, recurrent gates that are made of the second operand, and R - L
  int64_t states, others;    // S, and S - 1
  int64_t saved;
  int64_t grads;                  // W, gradients of gates: those of the recurrent parts first, in gate order
  int64_t parameters;             // U, vectors of one value for each hidden unit
  int64_t columns;                // W + U, with late gates W + U + 1: then the last is the second operand
  int64_t units;                  // hidden units in one panel of packed weights
  int64_t input_grad[kMaxGates];  // the gradient column of each input gate
  bool uses_h, uses_previous_h;   // see cells/all.h

  Pointwise<float> f32;
  Pointwise<double> f64;
  const void* context;

  template <class T>
  const Pointwise<T>& pointwise() const {
    if constexpr (std::is_same_v<T, double>)
      return f64;
    else
      return f32;
  }
};

}  // namespace rnnkit
