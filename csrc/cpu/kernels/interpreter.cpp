// Runs the programs of interpreter.h. An operation is a loop over the vectors of its registers, with the functions of
// lanes.h. A compiled cell gives other last bits where the compiler fuses a product and a sum into one operation, which
// rounds once: here each result is rounded on its own.
#include "cpu/interpreter.h"

#include <algorithm>

#include "common/lanes.h"

namespace rnnkit::RNNKIT_CAPABILITY {
namespace {

// Bytes of all registers together: they stay in L1 beside what is loaded and stored.
constexpr int64_t kRegisters = 24 * 1024;

template <class T>
class Machine {
  using V = Vector<T>;
  static constexpr int64_t kWidth = kLanes<T>;

 public:
  static void forward(const void* context, const ForwardBlock<T>& block) {
    Machine(block).run(programs(context).forward, block.rows, block.units);
  }
  static void operand(const void* context, const ForwardBlock<T>& block) {
    Machine(block).run(programs(context).operand, block.rows, block.units);
  }

  static void backward(const void* context, const BackwardBlock<T>& block) {
    Machine(block).run(programs(context).backward, block.rows, block.units);
  }
  static void grad_states(const void* context, const BackwardBlock<T>& block) {
    Machine(block).run(programs(context).grad_states, block.rows, block.units);
  }
  static void output(const void* context, const BackwardBlock<T>& block) {
    Machine(block).run(programs(context).output, block.rows, block.units);
  }
  static void late_grads(const void* context, const BackwardBlock<T>& block) {
    Machine(block).run(programs(context).late_grads, block.rows, block.units);
  }

 private:
  explicit Machine(const ForwardBlock<T>& block) {
    source(Source::x) = block.x;
    source(Source::h) = block.h;
    source(Source::x_bias) = block.x_bias;
    source(Source::h_bias) = block.h_bias;
    source(Source::parameters) = block.parameters;
    source(Source::previous_h) = block.previous_h;
    source(Source::other_states) = block.other_states;
    target(Target::states) = block.states;
    target(Target::saved) = block.saved;
  }
  explicit Machine(const BackwardBlock<T>& block) {
    source(Source::saved) = block.saved;
    source(Source::parameters) = block.parameters;
    source(Source::h) = block.h;
    source(Source::previous_h) = block.previous_h;
    source(Source::grad_h) = block.grad_h;
    source(Source::grad_others) = block.grad_others;
    source(Source::grad_operand) = block.grad_operand;
    target(Target::result) = block.result;
    target(Target::grad) = block.grad;
  }

  static const Programs& programs(const void* context) { return *static_cast<const Programs*>(context); }
  Block<const T>& source(Source of) { return sources_[static_cast<int>(of)]; }
  Block<T>& target(Target of) { return targets_[static_cast<int>(of)]; }

  // A register holds the rows and units of a tile, each row in whole vectors. The program runs on one tile after the
  // other. It stores after all loads, since what is written may be what was read.
  void run(const Program& program, int64_t rows, int64_t units) {
    if (program.begin == program.end) return;
    const int64_t room = std::max<int64_t>(1, kRegisters / program.registers / sizeof(V));  // vectors
    const int64_t columns = std::min(room, (units + kWidth - 1) / kWidth), most_rows = room / columns;
    size_ = columns * most_rows;
    registers_ = static_cast<V*>(__builtin_alloca_with_align(program.registers * size_ * sizeof(V), 8 * alignof(V)));
    for (row_ = 0; row_ < rows; row_ += most_rows)
      for (unit_ = 0; unit_ < units; unit_ += columns * kWidth) {
        rows_ = std::min(most_rows, rows - row_);
        units_ = std::min(columns * kWidth, units - unit_);
        columns_ = (units_ + kWidth - 1) / kWidth;
        for (const Instruction* one = program.begin; one != program.end; ++one) execute(*one);
      }
  }

  // Not inlined: alloca's memory is that of run().
  __attribute__((noinline)) void execute(const Instruction& one) {
    V* const to = at(one.to);
    const V *const a = at(one.a), *const b = at(one.b), *const c = at(one.c);
    const auto of = [&](const auto& result) RNNKIT_INLINE_LAMBDA {
      for (int64_t i = 0; i < rows_ * columns_; ++i) to[i] = (V)result(i);
    };
    switch (one.operation) {
#define RNNKIT_INFIX(name, sign) \
  case Operation::name:          \
    return of([&](int64_t i) RNNKIT_INLINE_LAMBDA { return a[i] sign b[i]; });
#define RNNKIT_UNARY(name) \
  case Operation::name:    \
    return of([&](int64_t i) RNNKIT_INLINE_LAMBDA { return RNNKIT_CAPABILITY::name(a[i]); });
#define RNNKIT_BINARY(name) \
  case Operation::name:     \
    return of([&](int64_t i) RNNKIT_INLINE_LAMBDA { return RNNKIT_CAPABILITY::name(a[i], b[i]); });
      RNNKIT_INFIX(add, +)
      RNNKIT_INFIX(sub, -)
      RNNKIT_INFIX(mul, *)
      RNNKIT_INFIX(div, /)
      RNNKIT_INFIX(lt, <)
      RNNKIT_INFIX(le, <=)
      RNNKIT_INFIX(gt, >)
      RNNKIT_INFIX(ge, >=)
      RNNKIT_INFIX(eq, ==)
      RNNKIT_INFIX(ne, !=)
      RNNKIT_UNARY(abs)
      RNNKIT_UNARY(exp)
      RNNKIT_UNARY(log1p)
      RNNKIT_UNARY(sigmoid)
      RNNKIT_UNARY(logsigmoid)
      RNNKIT_UNARY(tanh)
      RNNKIT_UNARY(relu)
      RNNKIT_UNARY(softplus)
      RNNKIT_BINARY(maximum)
      RNNKIT_BINARY(minimum)
#undef RNNKIT_INFIX
#undef RNNKIT_UNARY
#undef RNNKIT_BINARY
      case Operation::neg:
        return of([&](int64_t i) RNNKIT_INLINE_LAMBDA { return -a[i]; });
      case Operation::where:
        return of([&](int64_t i) RNNKIT_INLINE_LAMBDA { return select((Truth<T>)a[i], b[i], c[i]); });
      case Operation::constant:
        return of([&](int64_t) RNNKIT_INLINE_LAMBDA { return splat(static_cast<T>(one.value)); });
      case Operation::load:
        return load_value(sources_[one.a], one.b, to);
      case Operation::store:
        return store_value(targets_[one.a], one.b, c);
    }
  }

  V* at(int32_t number) const { return registers_ + number * size_; }

  void load_value(const Block<const T>& from, int64_t value, V* to) const {
    for (int64_t i = 0; i < rows_; ++i) {
      const T* const row = from.base + (row_ + i) * from.row + value * from.value + unit_;
      for_vectors<T>(units_, [&](int64_t u, auto lanes)
                                 RNNKIT_INLINE_LAMBDA { to[i * columns_ + u / kWidth] = load(row + u, lanes); });
    }
  }

  // A target that is not there is not wanted.
  void store_value(const Block<T>& target, int64_t value, const V* from) const {
    if (target.base == nullptr) return;
    for (int64_t i = 0; i < rows_; ++i) {
      T* const row = target.base + (row_ + i) * target.row + value * target.value + unit_;
      for_vectors<T>(units_, [&](int64_t u, auto lanes)
                                 RNNKIT_INLINE_LAMBDA { store(row + u, from[i * columns_ + u / kWidth], lanes); });
    }
  }

  Block<const T> sources_[static_cast<int>(Source::count)] = {};
  Block<T> targets_[static_cast<int>(Target::count)] = {};
  V* registers_ = nullptr;
  int64_t size_ = 0;              // vectors in a register
  int64_t row_ = 0, unit_ = 0;    // the tile's first
  int64_t rows_ = 0, units_ = 0;  // in the tile
  int64_t columns_ = 0;           // vectors in a row of the tile
};

template <class T>
Pointwise<T> pointwise() {
  return {Machine<T>::forward, Machine<T>::backward, Machine<T>::grad_states,
          Machine<T>::output,  Machine<T>::operand,  Machine<T>::late_grads};
}

}  // namespace

Interpreter interpreter() { return {pointwise<float>(), pointwise<double>()}; }

}  // namespace rnnkit::RNNKIT_CAPABILITY
