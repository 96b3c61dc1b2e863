// Instances of the persistent scan: the kernel, and the table of those that are built. Each .cu file that includes this
// builds those of one pass and one type; the host build has them all, as functions.
#pragma once

#include <vector>

#include "cuda/kernels.h"
#include "cuda/persistent.h"

#if defined(__CUDACC__)
#include "cuda/device.cuh"
#else
#include "cuda/host.h"
#endif

namespace rnnkit::cuda {

#if defined(__CUDACC__)
using BlockOfBuild = DeviceBlock;

template <class Pass>
__global__ void __launch_bounds__(kThreads, 1) persistent_kernel(const __grid_constant__ Scan scan) {
  extern __shared__ uint4 shared[];
  Pass pass(DeviceBlock{int(blockIdx.x)}, scan, reinterpret_cast<std::byte*>(shared));
  pass.begin();
  for (int64_t s = 0; s < scan.steps; ++s) pass.step(s);
  pass.end();
}
#else
using BlockOfBuild = HostBlock;

// Every block in turn, a step at a time.
template <class Pass>
void persistent_kernel(const Scan& scan) {
  const int64_t blocks = scan.directions * scan.slices * scan.blocks;
  const size_t bytes = shared_bytes_of<Pass>(scan.hidden, scan.columns);
  std::vector<std::vector<std::byte>> shared(blocks);
  std::vector<Pass> passes;
  for (int64_t block = 0; block < blocks; ++block) {
    shared[block].assign(bytes, std::byte(0xff));  // NaN where nothing was written
    passes.emplace_back(HostBlock{int(block)}, scan, shared[block].data());
  }
  for (Pass& pass : passes) pass.begin();
  for (int64_t s = 0; s < scan.steps; ++s)
    for (Pass& pass : passes) pass.step(s);
  for (Pass& pass : passes) pass.end();
}
#endif

// For each number of tiles one kernel.
template <template <class, class, class, int, int> class Pass, class Cell, class S, int kUnits, int... kTiles>
void add(std::vector<Persistent>& table, std::string_view cell) {
  (table.push_back({cell, kUnits, kTiles,
                    reinterpret_cast<const void*>(&persistent_kernel<Pass<BlockOfBuild, Cell, S, kUnits, kTiles>>),
                    &shared_bytes_of<Pass<BlockOfBuild, Cell, S, kUnits, kTiles>>}),
   ...);
}

// rnnkit/plan.py knows the same numbers. More sums than these do not fit in registers.
template <class Cell, class S>
void add_forward(std::vector<Persistent>& table, std::string_view cell) {
  if constexpr (Cell::gates > 1) {
    add<ForwardScan, Cell, S, 4, 2, 4, 8>(table, cell);
    add<ForwardScan, Cell, S, 8, 2, 4, 8>(table, cell);
    add<ForwardScan, Cell, S, 16, 2, 4>(table, cell);
  } else {
    add<ForwardScan, Cell, S, 16, 2, 4, 8>(table, cell);
  }
}

template <class Cell, class S>
void add_backward(std::vector<Persistent>& table, std::string_view cell) {
  add<BackwardScan, Cell, S, 8, 2, 4, 8>(table, cell);
  add<BackwardScan, Cell, S, 16, 2, 4, 8>(table, cell);
}

template <class S>
std::vector<Persistent> forward_kernels() {
  std::vector<Persistent> table;
#define RNNKIT_ADD(Cell, name) add_forward<Cell, S>(table, name);
  RNNKIT_CELLS(RNNKIT_ADD)
#undef RNNKIT_ADD
  return table;
}

template <class S>
std::vector<Persistent> backward_kernels() {
  std::vector<Persistent> table;
#define RNNKIT_ADD(Cell, name) add_backward<Cell, S>(table, name);
  RNNKIT_CELLS(RNNKIT_ADD)
#undef RNNKIT_ADD
  return table;
}

}  // namespace rnnkit::cuda
