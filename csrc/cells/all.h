// The only list of cells: X(struct, name in the ops).
//
// A cell has, for one hidden unit of a lane type V:
//   gates, states, saved   as in rnnkit.specs.CellSpec
//   units                  hidden units in one panel of packed weights
//   grads, input_grad[]    how many gradients the gates have, and the place of that of gate g's input part. Those of the
//                          recurrent parts come first, in gate order
//   uses_h                 whether backward() reads h_t; if so, h cannot be projected
//   uses_previous_h        whether forward() and backward() read h_{t-1}; if so, h cannot be projected
//   forward(x, h, state, save)
//                          x[g], h[g]: the input's and the recurrent part of gate g, with their biases. state: on entry
//                          of step t-1, on return of step t. save: on return what backward() needs
//   output(save)           h_t before a projection
//   grad_states(save, grad_state)
//                          where there are several states: makes of what backward() gets in grad_state the whole
//                          gradients of the states of step t, with what the other states of the step pass to them
//   backward(save, h, previous_h, grad_state, grad)
//                          grad_state: on entry the gradients of the states of step t; on return those of step t-1
//                          without what comes through the recurrent weights, which the caller adds. grad: on return
//                          the gradients of the gates
//   has_source             whether h' is made of a gate and of another new state, its source, which layer normalization
//                          normalizes in between. If so, what is saved is the gates and then state 1 before the step, and:
//   activate(x, h, save)   the gates alone
//   source(save)           the source, which is the new state 1
//   output_of(save, n)     h' of the source, normalized or not
//   grad_source(save, tanh_n, grad_h)
//                          the gradient of n
//   backward_of(save, tanh_n, grad_state, grad)
//                          backward() where grad_state has the whole gradient of state 1 already
#pragma once

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"

#define RNNKIT_CELLS(X)  \
  X(RnnTanh, "rnn_tanh") \
  X(RnnRelu, "rnn_relu") \
  X(Lstm, "lstm")        \
  X(Gru, "gru")          \
  X(GruWrites, "gru_writes")
