// The table of kernels for this instruction set.
#include "cpu/kernels/instantiate.h"

namespace rnnkit::RNNKIT_CAPABILITY {
#define X(Cell, name)                        \
  extern template struct Build<Cell, float>; \
  extern template struct Build<Cell, double>;
RNNKIT_CELLS(X)
#undef X

#define X(Cell, name) \
  {name, Cell::gates, Cell::states, Cell::saved, Build<Cell, float>::kernels(), Build<Cell, double>::kernels()},
CellTable cells() {
  static const CellKernels table[] = {RNNKIT_CELLS(X)};
  return {table, table + sizeof table / sizeof *table};
}
#undef X
}  // namespace rnnkit::RNNKIT_CAPABILITY
