// Instances of the persistent scan: the kernel, and the table of those that are built. persistent.cu builds those of one
// pass and one type; the host build has them all, as functions.
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
  std::vector<std::vector<std::byte>> shared(blocks);
  for (std::vector<std::byte>& memory : shared)
    memory.assign(Pass::shared_bytes(scan), std::byte(0xff));  // NaN where nothing is written
  std::vector<Pass> passes;
  for (int64_t block = 0; block < blocks; ++block)
    passes.emplace_back(HostBlock{int(block), &shared, scan.blocks}, scan, shared[block].data());
  for (Pass& pass : passes) pass.enter();
  for (Pass& pass : passes) pass.begin();
  for (int64_t s = 0; s < scan.steps; ++s)
    for (Pass& pass : passes) pass.step(s);
  for (Pass& pass : passes) pass.end();
}
#endif

template <class Pass>
Persistent instance(std::string_view cell) {
  return {cell,
          Pass::kCluster,
          Pass::kUnits,
          Pass::kTiles,
          reinterpret_cast<const void*>(&persistent_kernel<Pass>),
          &Pass::shared_bytes};
}

// Those of a cell that are listed in instances.inc, which rnnkit/instances.py writes for the build.
template <class Cell, class S, bool kBackward>
void add_instances(std::vector<Persistent>& table, std::string_view cell) {
#define RNNKIT_INSTANCE(backward, several_gates, cluster, units, tiles)      \
  if constexpr (backward == kBackward && several_gates == (Cell::gates > 1)) \
    table.push_back(instance<ScanOf<kBackward, BlockOfBuild, Cell, S, units, tiles, bool(cluster)>>(cell));
#include "instances.inc"
#undef RNNKIT_INSTANCE
}

template <class S, bool kBackward>
const std::vector<Persistent>& persistent_kernels() {
  static const std::vector<Persistent> found = [] {
    std::vector<Persistent> table;
#define RNNKIT_ADD(Cell, name) add_instances<Cell, S, kBackward>(table, name);
    RNNKIT_CELLS(RNNKIT_ADD)
#undef RNNKIT_ADD
    return table;
  }();
  return found;
}

}  // namespace rnnkit::cuda
