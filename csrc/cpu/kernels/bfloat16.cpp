// The kernels of every cell in bfloat16, for CPUs with instructions that multiply it.
#include "cpu/kernels/instantiate.h"

namespace rnnkit::RNNKIT_CAPABILITY {
#define X(Cell, name) Build<Cell, BFloat16>::kernels(),
const Kernels<BFloat16>* bfloat16_cells() {
  static const Kernels<BFloat16> table[] = {RNNKIT_CELLS(X)};
  return table;
}
#undef X
}  // namespace rnnkit::RNNKIT_CAPABILITY
