#include "cuda/instances.h"

namespace rnnkit::cuda {

const std::vector<Persistent>& backward_kernels(BFloat16) {
  static const auto table = backward_kernels<BFloat16>();
  return table;
}

}  // namespace rnnkit::cuda
