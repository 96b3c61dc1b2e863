#include "cuda/instances.h"

namespace rnnkit::cuda {

const std::vector<Persistent>& forward_kernels(BFloat16) {
  static const auto table = forward_kernels<BFloat16>();
  return table;
}

}  // namespace rnnkit::cuda
