// The kernels of every cell for one type: declared for cells.cpp, compiled in float.cpp, double.cpp and bfloat16.cpp,
// those of registered cells in registered.cpp.
#pragma once

#include "cpu/kernels/backward.h"
#include "cpu/kernels/forward.h"

namespace rnnkit::RNNKIT_CAPABILITY {

template <class Cell, class S>
struct Build {
  static_assert(kMostStates<Cell> <= kMaxStates);

  static int64_t forward_scratch(const Layer<S>& layer) { return Forward<Cell, S>(layer, nullptr).scratch(); }
  static void forward(const Layer<S>& layer, std::byte* scratch) { Forward<Cell, S>(layer, scratch).run(); }
  static int64_t backward_scratch(const Layer<S>& layer) { return Backward<Cell, S>(layer, nullptr).scratch(); }
  static void backward(const Layer<S>& layer, std::byte* scratch) { Backward<Cell, S>(layer, scratch).run(); }
  static int64_t packed_size(const Layer<S>& layer) { return Forward<Cell, S>::packed_size(layer); }
  static void pack(const Layer<S>& layer, std::byte* packed) { Forward<Cell, S>::pack(layer, packed); }
  static bool check(const Layer<S>& layer, const std::byte* packed) { return Forward<Cell, S>::check(layer, packed); }
  static Kernels<S> kernels() {
    return {forward_scratch, forward, backward_scratch, backward, packed_size, pack, check};
  }
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
