// The kernels of every cell in float.
#include "cpu/kernels/instantiate.h"

namespace rnnkit::RNNKIT_CAPABILITY {
#define X(Cell, name) template struct Build<Cell, float>;
RNNKIT_CELLS(X)
#undef X
}  // namespace rnnkit::RNNKIT_CAPABILITY
