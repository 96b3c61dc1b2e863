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
__global__ void __launch_bounds__(kThreads, 1) persistent_kernel(const __grid_constant__ PersistentScan scan) {
#if __CUDA_ARCH__ < 900
  if (Pass::kCluster) {  // there are no such instructions; the plan and the launch see to it that it is not run
    __trap();
    return;
  }
#endif
  extern __shared__ uint4 shared[];
  Pass pass(DeviceBlock{int(blockIdx.x)}, scan, reinterpret_cast<std::byte*>(shared));
  pass.enter();
  pass.begin();
  for (int64_t s = 0; s < scan.steps; ++s) pass.step(s);
  pass.end();
}
#else
using BlockOfBuild = HostBlock;

// Every block in turn, a step at a time. A cluster's blocks write to one another, so all memory is there before any runs.
template <class Pass>
void persistent_kernel(const PersistentScan& scan) {
  const int64_t blocks = scan.directions * scan.slices * scan.blocks;
  const size_t bytes = shared_bytes_of<Pass>(scan.hidden, scan.columns);
  std::vector<std::vector<std::byte>> shared(blocks);
  for (std::vector<std::byte>& memory : shared) memory.assign(bytes, std::byte(0xff));  // NaN where nothing is written
  std::vector<Pass> passes;
  for (int64_t block = 0; block < blocks; ++block) {
    passes.emplace_back(HostBlock{int(block), &shared, scan.blocks}, scan, shared[block].data());
  }
  for (Pass& pass : passes) pass.enter();
  for (Pass& pass : passes) pass.begin();
  for (int64_t s = 0; s < scan.steps; ++s)
    for (Pass& pass : passes) pass.step(s);
  for (Pass& pass : passes) pass.end();
}
#endif

// For each number of tiles one kernel.
template <template <class, class, class, int, int, bool> class Pass, bool kCluster, class Cell, class S, int kUnits,
          int... kTiles>
void add(std::vector<Persistent>& table, std::string_view cell) {
  (table.push_back(
       {cell, kCluster, kUnits, kTiles,
        reinterpret_cast<const void*>(&persistent_kernel<Pass<BlockOfBuild, Cell, S, kUnits, kTiles, kCluster>>),
        &shared_bytes_of<Pass<BlockOfBuild, Cell, S, kUnits, kTiles, kCluster>>}),
   ...);
}

// Those that were the fastest somewhere; rnnkit/plan.py knows the same numbers. More sums do not fit in registers.
template <class Cell, class S>
void add_forward(std::vector<Persistent>& table, std::string_view cell) {
  if constexpr (Cell::gates > 1) {
    add<ForwardScan, false, Cell, S, 4, 1, 2>(table, cell);
    add<ForwardScan, false, Cell, S, 8, 1, 2, 4, 8>(table, cell);
    add<ForwardScan, false, Cell, S, 16, 1, 2, 4>(table, cell);
  } else {
    add<ForwardScan, false, Cell, S, 16, 1, 2, 4, 8>(table, cell);
  }
  add<ForwardScan, true, Cell, S, 16, 1>(table, cell);
}

template <class Cell, class S>
void add_backward(std::vector<Persistent>& table, std::string_view cell) {
  add<BackwardScan, false, Cell, S, 8, 1, 2>(table, cell);
  add<BackwardScan, false, Cell, S, 16, 1, 2, 4, 8>(table, cell);
  add<BackwardScan, true, Cell, S, 16, 1>(table, cell);
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
