// The pointwise part of a cell that no compiler has made: programs that kernels/interpreter.cpp runs, operation by
// operation, on blocks of rows and units that stay in L1.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/pointwise.h"

namespace rnnkit {

// The operations on registers, by their names in rnnkit.graph.
// clang-format off: its versions break these lines in different places
#define RNNKIT_OPERATIONS(X) \
  X(add) X(sub) X(mul) X(div) X(neg) X(abs) X(exp) X(log1p) X(sigmoid) X(logsigmoid) X(tanh) X(relu) X(softplus) \
  X(maximum) X(minimum) X(lt) X(le) X(gt) X(ge) X(eq) X(ne) X(where)

// The members of ForwardBlock and BackwardBlock that are read, and that are written.
#define RNNKIT_SOURCES(X) \
  X(x) X(h) X(x_bias) X(h_bias) X(parameters) X(previous_h) X(other_states) X(saved) X(grad_h) X(grad_others) \
  X(grad_operand)
#define RNNKIT_TARGETS(X) X(states) X(saved) X(result) X(grad)
// clang-format on

#define X(name) name,
enum class Operation : int32_t { RNNKIT_OPERATIONS(X) constant, load, store };
enum class Source : int32_t { RNNKIT_SOURCES(X) count };
enum class Target : int32_t { RNNKIT_TARGETS(X) count };
#undef X

// `to` and the operands of an operation are registers. load: to = value b of source a. store: value b of target a is
// register c. constant: to = value.
struct Instruction {
  Operation operation;
  int32_t to, a, b, c;
  double value;
};

struct Program {
  const Instruction *begin, *end;
  int64_t registers;
};

// The context of the functions below: a program for each function of Pointwise.
struct Programs {
  Program forward, backward, grad_states, output, operand, late_grads;
};

// The functions that run programs, built for one ISA.
struct Interpreter {
  Pointwise<float> f32;
  Pointwise<double> f64;
};

namespace baseline {
Interpreter interpreter();
}
namespace avx2 {
Interpreter interpreter();
}
namespace avx512 {
Interpreter interpreter();
}

// A program as Python writes it: how many registers it has, and (name, to, a, b, c, value) of each instruction. The
// name of a load begins with "load " and ends with the source's, that of a store with the target's.
using WrittenInstruction = std::tuple<std::string, int32_t, int32_t, int32_t, int32_t, double>;
using WrittenProgram = std::tuple<int64_t, std::vector<WrittenInstruction>>;

// The programs of Pointwise's functions, in their order, for good. Throws if there is no such name.
const Programs* make_programs(const std::array<WrittenProgram, kFunctions>& written);

}  // namespace rnnkit
