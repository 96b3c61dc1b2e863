// The kernels of every cell in double.
#include "cpu/kernels/instantiate.h"

namespace rnnkit::RNNKIT_CAPABILITY {
#define X(Cell, name) template struct Build<Cell, double>;
RNNKIT_CELLS(X)
#undef X
}  // namespace rnnkit::RNNKIT_CAPABILITY
