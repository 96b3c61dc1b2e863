#include "cuda/instances.h"

namespace rnnkit::cuda {

const std::vector<Persistent>& backward_kernels(Half) {
  static const auto table = backward_kernels<Half>();
  return table;
}

}  // namespace rnnkit::cuda
