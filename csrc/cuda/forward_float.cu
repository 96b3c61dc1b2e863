#include "cuda/instances.h"

namespace rnnkit::cuda {

const std::vector<Persistent>& forward_kernels(float) {
  static const auto table = forward_kernels<float>();
  return table;
}

}  // namespace rnnkit::cuda
