// The table of kernels for this instruction set.
#include "cpu/kernels/instantiate.h"

namespace rnnkit::RNNKIT_CAPABILITY {
#define X(Cell, name)                        \
  extern template struct Build<Cell, float>; \
  extern template struct Build<Cell, double>;
RNNKIT_CELLS(X)
#undef X

// One row of the table.
template <class Cell>
CellKernels row(const char* name) {
  CellKernels row{.name = name,
                  .gates = Cell::gates,
                  .recurrent = Cell::gates,
                  .states = Cell::states,
                  .saved = Cell::saved,
                  .parameters = 0,
                  .projects = !Cell::uses_h && !Cell::uses_previous_h,
                  .has_source = Cell::has_source,
                  .uses_h = Cell::uses_h,
                  .input_grad = {},
                  .registered = nullptr,
                  .kernels = {Build<Cell, float>::kernels(), Build<Cell, double>::kernels()}};
  static_assert(Cell::gates <= kMaxGates && Cell::states <= kMaxStates);
  for (int g = 0; g < Cell::gates; ++g) row.input_grad[g] = Cell::input_grad[g];
  return row;
}

#define X(Cell, name) row<Cell>(name),
CellTable cells() {
  static const CellKernels table[] = {RNNKIT_CELLS(X)};
  return {table, table + sizeof table / sizeof *table};
}
#undef X
}  // namespace rnnkit::RNNKIT_CAPABILITY
