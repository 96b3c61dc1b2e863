// The kernels of every cell for one type: declared for cells.cpp, compiled in float.cpp and double.cpp.
#pragma once

#include "cpu/kernels/backward.h"
#include "cpu/kernels/forward.h"

namespace rnnkit::RNNKIT_CAPABILITY {

template <class Cell, class T>
struct Build {
  static int64_t forward_scratch(const Layer<T>& layer) { return Forward<Cell, T>(layer, nullptr).scratch(); }
  static void forward(const Layer<T>& layer, T* scratch) { Forward<Cell, T>(layer, scratch).run(); }
  static int64_t backward_scratch(const Layer<T>& layer) { return Backward<Cell, T>(layer, nullptr).scratch(); }
  static void backward(const Layer<T>& layer, T* scratch) { Backward<Cell, T>(layer, scratch).run(); }
  static Kernels<T> kernels() { return {forward_scratch, forward, backward_scratch, backward}; }
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
