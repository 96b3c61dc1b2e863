// The kernels of registered cells: one for all of them, in float and in double.
#include "cpu/kernels/instantiate.h"

namespace rnnkit::RNNKIT_CAPABILITY {
KernelsOfCell registered_cells() { return {Build<Registered, float>::kernels(), Build<Registered, double>::kernels()}; }
}  // namespace rnnkit::RNNKIT_CAPABILITY
