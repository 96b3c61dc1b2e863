// The only list of cells: X(struct, name in the ops).
//
// A cell has, for one hidden unit of a lane type V:
//   gates, states, saved   as in rnnkit.reference.CellSpec
//   units                  hidden units in one panel of packed weights
//   grads, input_grad[]    gradients of the gates: the recurrent parts' come first, in gate order; input_grad[g] is
//                          the place of the gradient of gate g's input part
//   uses_h                 whether backward() reads h_t; then h cannot be projected
//   uses_previous_h        whether forward() and backward() read h_{t-1}; likewise
//   forward(x, h, state, save)        x[g], h[g] the two parts of each gate; state: in t-1, out t
//   output(save)                      h_t before a projection, from what was saved
//   backward(save, h, previous_h, grad_state, grad)
//                                     grad_state: in of the states t, out of the states t-1 but for what goes
//                                     through the recurrent weights
#pragma once

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"

#define RNNKIT_CELLS(X)  \
  X(RnnTanh, "rnn_tanh") \
  X(RnnRelu, "rnn_relu") \
  X(Lstm, "lstm")        \
  X(Gru, "gru")
