// The stepwise path's kernels: a cell for every hidden unit and row of the batch, between two matrix products.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/step.h"

namespace rnnkit::cuda {
namespace {

constexpr int kStepThreads = 128;

dim3 grid_of(int64_t rows, int64_t width) {
  return dim3(unsigned((width + kStepThreads - 1) / kStepThreads), unsigned(std::min<int64_t>(rows, 65535)));
}

// Calls body(row, column) for this thread's part of [rows, width].
template <class Body>
__device__ __forceinline__ void each_element(int64_t rows, int64_t width, const Body& body) {
  const int64_t column = blockIdx.x * int64_t(kStepThreads) + threadIdx.x;
  if (column >= width) return;
  for (int64_t n = blockIdx.y; n < rows; n += gridDim.y) body(n, column);
}

template <class Cell, class S>
__global__ void __launch_bounds__(kStepThreads) forward_step(const __grid_constant__ Steps steps) {
  const Step& step = steps.of[blockIdx.z];
  each_element(step.rows, step.hidden, [&](int64_t n, int64_t unit) { forward_element<Cell, S>(step, n, unit); });
}

template <class Cell, class S>
__global__ void __launch_bounds__(kStepThreads) backward_step(const __grid_constant__ Steps steps) {
  const Step& step = steps.of[blockIdx.z];
  each_element(step.rows, step.hidden, [&](int64_t n, int64_t unit) { backward_element<Cell, S>(step, n, unit); });
}

template <class Cell, class S>
__global__ void __launch_bounds__(kStepThreads) unproject(const Sum<S>* reserve, S* h, int64_t rows, int64_t hidden) {
  each_element(rows, hidden,
               [&](int64_t row, int64_t unit) { unprojected_element<Cell, S>(reserve, h, row, hidden, unit); });
}

template <class S>
__global__ void __launch_bounds__(kStepThreads) add_rows(const __grid_constant__ Addition addition) {
  each_element(addition.rows, addition.width, [&](int64_t n, int64_t column) { add_element<S>(addition, n, column); });
}

template <class S>
__global__ void __launch_bounds__(kStepThreads) put_rows_back(const __grid_constant__ PutBack put_back) {
  each_element(put_back.rows, put_back.width,
               [&](int64_t n, int64_t column) { put_back_element<S>(put_back, n, column); });
}

std::string last_error(const char* what) {
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? "" : std::string(what) + ": " + cudaGetErrorString(status);
}

template <class Cell, class S>
void launch(bool backward, const Steps& steps, Stream stream) {
  const Step& step = steps.of[0];
  dim3 grid = grid_of(step.rows, step.hidden);
  grid.z = static_cast<unsigned>(steps.directions);
  if (backward)
    backward_step<Cell, S><<<grid, kStepThreads, 0, stream>>>(steps);
  else
    forward_step<Cell, S><<<grid, kStepThreads, 0, stream>>>(steps);
}

}  // namespace

std::string launch_step(std::string_view cell, Type type, bool backward, const Steps& steps, Stream stream) {
  with_type(type, [&](auto element) {
#define RNNKIT_LAUNCH(Cell, name) \
  if (cell == name) launch<Cell, decltype(element)>(backward, steps, stream);
    RNNKIT_CELLS(RNNKIT_LAUNCH)
#undef RNNKIT_LAUNCH
  });
  return last_error("launch of a step");
}

std::string launch_unprojected(std::string_view cell, Type type, const void* reserve, void* h, int64_t rows,
                               int64_t hidden, Stream stream) {
  with_type(type, [&](auto element) {
    using S = decltype(element);
#define RNNKIT_LAUNCH(Cell, name)                                                                               \
  if (cell == name)                                                                                             \
    unproject<Cell, S><<<grid_of(rows, hidden), kStepThreads, 0, stream>>>(static_cast<const Sum<S>*>(reserve), \
                                                                           static_cast<S*>(h), rows, hidden);
    RNNKIT_CELLS(RNNKIT_LAUNCH)
#undef RNNKIT_LAUNCH
  });
  return last_error("launch of an unprojected h");
}

std::string launch_add(Type type, const Addition& addition, Stream stream) {
  with_type(type, [&](auto element) {
    add_rows<decltype(element)><<<grid_of(addition.rows, addition.width), kStepThreads, 0, stream>>>(addition);
  });
  return last_error("launch of an addition");
}

std::string launch_put_back(Type type, const PutBack& put_back, Stream stream) {
  with_type(type, [&](auto element) {
    put_rows_back<decltype(element)><<<grid_of(put_back.rows, put_back.width), kStepThreads, 0, stream>>>(put_back);
  });
  return last_error("launch of a reset");
}

}  // namespace rnnkit::cuda
