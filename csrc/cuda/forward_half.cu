#include "cuda/instances.h"

namespace rnnkit::cuda {

const std::vector<Persistent>& forward_kernels(Half) {
  static const auto table = forward_kernels<Half>();
  return table;
}

}  // namespace rnnkit::cuda
