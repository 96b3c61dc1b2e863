// Makes the functions of a registered cell (cpu/pointwise.h) of a struct written as those in cells/all.h, for a library
// that is compiled for this cell alone, with the flags of the ISA that the kernels use and with -fwrapv.
//
// The struct may also have:
//   recurrent   R, the number of recurrent gates, if it is not `gates`; forward() then gets h[0] to h[R-1]
//   parameters  U. Then each function gets the parameters' values as its last argument; the gradients of the parameters
//               are grad[grads] to grad[grads+U-1]
//   late        L, the number of late gates (cpu/pointwise.h), the last of the recurrent ones. Then there are also
//                 operand(x, h, state)                                      which returns the second operand
//                 late_grads(save, h, previous_h, grad_state, grad)         grad[0] to grad[L-1]: of the late gates
//               and backward() gets the second operand's gradient as grad_state[states], writes the second operand
//               to grad[grads+U], and leaves the late gates' gradients out
// It needs neither `units` nor, without a projection, output(), nor, with one state, grad_states().
#pragma once

#include "common/lanes.h"
#include "cpu/pointwise.h"

namespace rnnkit::RNNKIT_CAPABILITY {

template <class Cell, class T>
class CompiledCell {
  using V = Vector<T>;

  static constexpr int kGates = Cell::gates, kStates = Cell::states, kSaved = Cell::saved;
  static constexpr int kRecurrent = [] {
    if constexpr (requires { Cell::recurrent; })
      return int(Cell::recurrent);
    else
      return int(Cell::gates);
  }();
  static constexpr int kParameters = [] {
    if constexpr (requires { Cell::parameters; })
      return int(Cell::parameters);
    else
      return 0;
  }();
  static constexpr int kLate = [] {
    if constexpr (requires { Cell::late; })
      return int(Cell::late);
    else
      return 0;
  }();
  static constexpr int kEarly = kRecurrent - kLate, kColumns = Cell::grads + kParameters + (kLate > 0 ? 1 : 0);

 public:
  static void forward(const void* /*context*/, const ForwardBlock<T>& given) {
    const ForwardBlock<T> block = given;  // a copy, for stores of vectors may alias anything in memory
    for_values(block, [&](int64_t i, int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
      V x[kGates], h[kRecurrent + 1], parameters[kParameters + 1], state[kStates], save[kSaved + 1];
      read_forward<kRecurrent>(block, i, u, lanes, x, h, parameters, state);
      if constexpr (kParameters > 0)
        Cell::forward(x, h, state, save, parameters);
      else
        Cell::forward(x, h, state, save);
      write<kStates>(state, i, u, lanes, block.states);
      if (block.saved.base != nullptr) write<kSaved>(save, i, u, lanes, block.saved);
    });
  }

  static void backward(const void* /*context*/, const BackwardBlock<T>& given) {
    const BackwardBlock<T> block = given;
    for_values(block, [&](int64_t i, int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
      V parameters[kParameters + 1], save[kSaved + 1], grad_state[kStates + 1], grad[kColumns];
      V h{}, previous_h{};
      read_backward(block, i, u, lanes, save, parameters, grad_state);
      read_h(block, i, u, lanes, &h, &previous_h);
      if constexpr (kLate > 0) read<1>(block.grad_operand, i, u, lanes, grad_state + kStates);
      if constexpr (kParameters > 0)
        Cell::backward(save, h, previous_h, grad_state, grad, parameters);
      else
        Cell::backward(save, h, previous_h, grad_state, grad);
      write<kStates>(grad_state, i, u, lanes, block.result);
      write<kEarly>(grad, i, u, lanes, block.grad);
      write<kColumns - kRecurrent>(grad + kRecurrent, i, u, lanes, block.grad, kRecurrent);
    });
  }

  static void grad_states(const void* /*context*/, const BackwardBlock<T>& given) {
    const BackwardBlock<T> block = given;
    if constexpr (kStates > 1)
      for_values(block, [&](int64_t i, int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
        V parameters[kParameters + 1], save[kSaved + 1], grad_state[kStates + 1];
        read_backward(block, i, u, lanes, save, parameters, grad_state);
        if constexpr (kLate > 0) read<1>(block.grad_operand, i, u, lanes, grad_state + kStates);
        if constexpr (kParameters > 0)
          Cell::grad_states(save, grad_state, parameters);
        else
          Cell::grad_states(save, grad_state);
        write<kStates>(grad_state, i, u, lanes, block.result);
      });
  }

  // Only for a cell that may be projected.
  static void output(const void* /*context*/, const BackwardBlock<T>& given) {
    const BackwardBlock<T> block = given;
    for_values(block, [&](int64_t i, int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
      V parameters[kParameters + 1], save[kSaved + 1], h;
      read<kSaved>(block.saved, i, u, lanes, save);
      read<kParameters>(block.parameters, 0, u, lanes, parameters);
      if constexpr (kParameters > 0)
        h = Cell::output(save, parameters);
      else
        h = Cell::output(save);
      write<1>(&h, i, u, lanes, block.result);
    });
  }

  // Only for a cell with late gates, and so is the next one.
  static void operand(const void* /*context*/, const ForwardBlock<T>& given) {
    const ForwardBlock<T> block = given;
    for_values(block, [&](int64_t i, int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
      V x[kGates], h[kEarly + 1], parameters[kParameters + 1], state[kStates], operand;
      read_forward<kEarly>(block, i, u, lanes, x, h, parameters, state);
      if constexpr (kParameters > 0)
        operand = Cell::operand(x, h, state, parameters);
      else
        operand = Cell::operand(x, h, state);
      write<1>(&operand, i, u, lanes, block.states);
    });
  }

  static void late_grads(const void* /*context*/, const BackwardBlock<T>& given) {
    const BackwardBlock<T> block = given;
    for_values(block, [&](int64_t i, int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA {
      V parameters[kParameters + 1], save[kSaved + 1], grad_state[kStates], grad[kLate], h{}, previous_h{};
      read_backward(block, i, u, lanes, save, parameters, grad_state);
      read_h(block, i, u, lanes, &h, &previous_h);
      if constexpr (kParameters > 0)
        Cell::late_grads(save, h, previous_h, grad_state, grad, parameters);
      else
        Cell::late_grads(save, h, previous_h, grad_state, grad);
      write<kLate>(grad, i, u, lanes, block.result);
    });
  }

 private:
  template <class Of, class Body>
  static RNNKIT_INLINE void for_values(const Of& block, const Body& body) {
    for (int64_t i = 0; i < block.rows; ++i)
      for_vectors<T>(block.units, [&](int64_t u, auto lanes) RNNKIT_INLINE_LAMBDA { body(i, u, lanes); });
  }

  template <int kCount, class Lanes>
  static RNNKIT_INLINE void read(Block<const T> from, int64_t i, int64_t u, Lanes lanes, V* to) {
#pragma GCC unroll 64
    for (int k = 0; k < kCount; ++k) to[k] = load(from.base + i * from.row + k * from.value + u, lanes);
  }
  template <int kCount, class Lanes>
  static RNNKIT_INLINE void add(Block<const T> bias, int64_t u, Lanes lanes, V* to) {
#pragma GCC unroll 64
    for (int k = 0; k < kCount; ++k) to[k] += load(bias.base + k * bias.value + u, lanes);
  }
  template <int kCount, class Lanes>
  static RNNKIT_INLINE void write(const V* from, int64_t i, int64_t u, Lanes lanes, Block<T> to, int64_t first = 0) {
#pragma GCC unroll 64
    for (int k = 0; k < kCount; ++k) store(to.base + i * to.row + (first + k) * to.value + u, from[k], lanes);
  }

  // kParts: of the recurrent parts, the first ones.
  template <int kParts, class Lanes>
  static RNNKIT_INLINE void read_forward(const ForwardBlock<T>& block, int64_t i, int64_t u, Lanes lanes, V* x, V* h,
                                         V* parameters, V* state) {
    read<kGates>(block.x, i, u, lanes, x);
    read<kParts>(block.h, i, u, lanes, h);
    add<kGates>(block.x_bias, u, lanes, x);
    add<kParts>(block.h_bias, u, lanes, h);
    read<kParameters>(block.parameters, 0, u, lanes, parameters);
    read<1>(block.previous_h, i, u, lanes, state);
    read<kStates - 1>(block.other_states, i, u, lanes, state + 1);
  }

  template <class Lanes>
  static RNNKIT_INLINE void read_h(const BackwardBlock<T>& block, int64_t i, int64_t u, Lanes lanes, V* h,
                                   V* previous_h) {
    if constexpr (Cell::uses_h) read<1>(block.h, i, u, lanes, h);
    if constexpr (Cell::uses_previous_h) read<1>(block.previous_h, i, u, lanes, previous_h);
  }

  template <class Lanes>
  static RNNKIT_INLINE void read_backward(const BackwardBlock<T>& block, int64_t i, int64_t u, Lanes lanes, V* save,
                                          V* parameters, V* grad_state) {
    read<kSaved>(block.saved, i, u, lanes, save);
    read<kParameters>(block.parameters, 0, u, lanes, parameters);
    read<1>(block.grad_h, i, u, lanes, grad_state);
    read<kStates - 1>(block.grad_others, i, u, lanes, grad_state + 1);
  }
};

}  // namespace rnnkit::RNNKIT_CAPABILITY

// Defines the C functions NAME_forward_f32, NAME_forward_f64 and so on of a cell's struct.
#define RNNKIT_COMPILED_CELL(Cell, name)                   \
  RNNKIT_COMPILED_FUNCTION(Cell, name, forward, Forward)   \
  RNNKIT_COMPILED_FUNCTION(Cell, name, backward, Backward) \
  RNNKIT_COMPILED_FUNCTION(Cell, name, grad_states, Backward)

// The same of a cell that may be projected.
#define RNNKIT_COMPILED_CELL_THAT_PROJECTS(Cell, name) \
  RNNKIT_COMPILED_CELL(Cell, name)                     \
  RNNKIT_COMPILED_FUNCTION(Cell, name, output, Backward)

// The same of a cell that has late gates.
#define RNNKIT_COMPILED_CELL_WITH_LATE_GATES(Cell, name) \
  RNNKIT_COMPILED_CELL(Cell, name)                       \
  RNNKIT_COMPILED_FUNCTION(Cell, name, operand, Forward) \
  RNNKIT_COMPILED_FUNCTION(Cell, name, late_grads, Backward)

#define RNNKIT_COMPILED_FUNCTION(Cell, name, function, Pass)                                               \
  extern "C" void name##_##function##_f32(const void* context, const rnnkit::Pass##Block<float>& block) {  \
    rnnkit::RNNKIT_CAPABILITY::CompiledCell<Cell, float>::function(context, block);                        \
  }                                                                                                        \
  extern "C" void name##_##function##_f64(const void* context, const rnnkit::Pass##Block<double>& block) { \
    rnnkit::RNNKIT_CAPABILITY::CompiledCell<Cell, double>::function(context, block);                       \
  }
