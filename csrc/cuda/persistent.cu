// The persistent kernels of one pass and one type: RNNKIT_BACKWARD and RNNKIT_ELEMENT say which.
#include "cuda/instances.h"

namespace rnnkit::cuda {

template const std::vector<Persistent>& persistent_kernels<RNNKIT_ELEMENT, RNNKIT_BACKWARD>();

}  // namespace rnnkit::cuda
