// The host build of the GPU's kernels, for tests: the launches of kernels.h as loops. Built with register.cpp and
// RNNKIT_HOST into a library whose ops take CPU tensors (tests/host_build.py).
#include "cuda/instances.h"
#include "cuda/step.h"

namespace rnnkit::cuda {

#define RNNKIT_TABLES(S)                                    \
  const std::vector<Persistent>& forward_kernels(S) {       \
    static const auto table = forward_kernels<S>();         \
    return table;                                           \
  }                                                         \
  const std::vector<Persistent>& backward_kernels(S) {      \
    static const auto table = backward_kernels<S>();        \
    return table;                                           \
  }
RNNKIT_TABLES(BFloat16)
RNNKIT_TABLES(Half)
RNNKIT_TABLES(float)

std::string launch_persistent(const Persistent& kernel, const Scan& scan, Stream) {
  reinterpret_cast<void (*)(const Scan&)>(const_cast<void*>(kernel.function))(scan);
  return "";
}

std::string launch_step(std::string_view cell, Type type, bool backward, const Step& step, Stream) {
  with_type(type, [&](auto element) {
    using S = decltype(element);
    for (int64_t n = 0; n < (backward ? step.visited() : step.count); ++n)
      for (int64_t unit = 0; unit < step.hidden; ++unit) {
#define RNNKIT_LAUNCH(Cell, name) \
  if (cell == name) backward ? backward_element<Cell, S>(step, n, unit) : forward_element<Cell, S>(step, n, unit);
        RNNKIT_CELLS(RNNKIT_LAUNCH)
#undef RNNKIT_LAUNCH
      }
  });
  return "";
}

std::string launch_add(Type type, const void* a, const void* b, int64_t b_stride, void* sum, int64_t rows,
                       int64_t width, Stream) {
  with_type(type, [&](auto element) {
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t column = 0; column < width; ++column)
        add_element<decltype(element)>(a, b, b_stride, sum, width, n, column);
  });
  return "";
}

}  // namespace rnnkit::cuda
