#include "cuda/instances.h"

namespace rnnkit::cuda {

const std::vector<Persistent>& backward_kernels(float) {
  static const auto table = backward_kernels<float>();
  return table;
}

}  // namespace rnnkit::cuda
