// The stepwise path's kernels: a cell for every hidden unit and row of the batch, between two matrix products.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/layer_norm.h"

namespace rnnkit::cuda {
namespace {

constexpr int kStepThreads = 128, kRowThreads = 256;

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
  each_element(step.rows, step.hidden,
               [&](int64_t n, int64_t unit) { forward_element<Cell, S>(step, n, unit, Plain<Cell, S>()); });
}

template <class Cell, class S>
__global__ void __launch_bounds__(kStepThreads) backward_step(const __grid_constant__ Steps steps) {
  const Step& step = steps.of[blockIdx.z];
  each_element(step.rows, step.hidden, [&](int64_t n, int64_t unit) { backward_element<Cell, S>(step, n, unit); });
}

template <class Cell, class S>
__global__ void __launch_bounds__(kStepThreads) unproject(const __grid_constant__ Steps steps) {
  const Step& step = steps.of[blockIdx.z];
  each_element(step.rows, step.hidden,
               [&](int64_t n, int64_t unit) { unprojected_element<Cell, S>(step, n, unit, Plain<Cell, S>()); });
}

// A block as a team that has a row, see layer_norm.h.
template <class T>
class BlockTeam {
 public:
  static constexpr int kBytes = kRowThreads / 32 * int(sizeof(Pair<T>));  // of shared memory

  __device__ explicit BlockTeam(std::byte* shared) : of_warps_(reinterpret_cast<Pair<T>*>(shared)) {}

  // Calls body(i) for i < count; one thread always has the same i.
  template <class Body>
  __device__ __forceinline__ void each(int64_t count, const Body& body) const {
    for (int64_t i = threadIdx.x; i < count; i += kRowThreads) body(i);
  }
  // The sums over i < count of body(i), for every thread.
  template <class Body>
  __device__ __forceinline__ Pair<T> sums(int64_t count, const Body& body) const {
    Pair<T> sum{0, 0};
    each(count, [&](int64_t i) { sum = plus(sum, body(i)); });
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
      sum = plus(sum, {__shfl_xor_sync(~0u, sum.first, lanes), __shfl_xor_sync(~0u, sum.second, lanes)});
    if (threadIdx.x % 32 == 0) of_warps_[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = of_warps_[0];
#pragma unroll
    for (int warp = 1; warp < kRowThreads / 32; ++warp) sum = plus(sum, of_warps_[warp]);
    __syncthreads();  // before the next sums are written
    return sum;
  }

 private:
  static __device__ __forceinline__ Pair<T> plus(const Pair<T>& a, const Pair<T>& b) {
    return {a.first + b.first, a.second + b.second};
  }

  Pair<T>* of_warps_;
};

// A block for each row, where rows are normalized.
template <class Cell, class S>
__global__ void __launch_bounds__(kRowThreads, 1) forward_rows(const __grid_constant__ Steps steps) {
  extern __shared__ uint4 shared[];
  forward_row<Cell, S>(steps.of[blockIdx.y], blockIdx.x, BlockTeam<Sum<S>>(reinterpret_cast<std::byte*>(shared)));
}

template <class Cell, class S>
__global__ void __launch_bounds__(kRowThreads, 1) backward_rows(const __grid_constant__ Steps steps) {
  extern __shared__ uint4 shared[];
  backward_row<Cell, S>(steps.of[blockIdx.y], blockIdx.x, BlockTeam<Sum<S>>(reinterpret_cast<std::byte*>(shared)));
}

template <class Cell, class S>
__global__ void __launch_bounds__(kRowThreads, 1) unproject_rows(const __grid_constant__ Steps steps) {
  extern __shared__ uint4 shared[];
  unprojected_row<Cell, S>(steps.of[blockIdx.y], blockIdx.x, BlockTeam<Sum<S>>(reinterpret_cast<std::byte*>(shared)));
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

// Launches `rows` if the rows of a step are normalized, else `elements`.
template <class S>
void launch(void (*elements)(Steps), void (*rows)(Steps), const Steps& steps, Stream stream) {
  const Step& step = steps.of[0];
  const auto directions = static_cast<unsigned>(steps.directions);
  if (step.norms.hh != nullptr) {
    rows<<<dim3(unsigned(step.rows), directions), kRowThreads, BlockTeam<Sum<S>>::kBytes, stream>>>(steps);
    return;
  }
  dim3 grid = grid_of(step.rows, step.hidden);
  grid.z = directions;
  elements<<<grid, kStepThreads, 0, stream>>>(steps);
}

}  // namespace

std::string launch_step(std::string_view cell, Type type, bool backward, const Steps& steps, Stream stream) {
  with_type(type, [&](auto element) {
    using S = decltype(element);
#define RNNKIT_LAUNCH(Cell, name)                                                       \
  if (cell == name)                                                                     \
    backward ? launch<S>(backward_step<Cell, S>, backward_rows<Cell, S>, steps, stream) \
             : launch<S>(forward_step<Cell, S>, forward_rows<Cell, S>, steps, stream);
    RNNKIT_CELLS(RNNKIT_LAUNCH)
#undef RNNKIT_LAUNCH
  });
  return last_error("launch of a step");
}

std::string launch_unprojected(std::string_view cell, Type type, const Steps& steps, Stream stream) {
  with_type(type, [&](auto element) {
    using S = decltype(element);
#define RNNKIT_LAUNCH(Cell, name) \
  if (cell == name) launch<S>(unproject<Cell, S>, unproject_rows<Cell, S>, steps, stream);
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
