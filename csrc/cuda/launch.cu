// The launch of a persistent kernel.
#include <cuda_runtime.h>

#include "cuda/kernels.h"

namespace rnnkit::cuda {
namespace {

std::string error_of(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // so that it is not reported once more
  return std::string(what) + ": " + cudaGetErrorString(status);
}

}  // namespace

std::string launch_persistent(const Persistent& kernel, const Scan& scan, Stream stream) {
  const auto bytes = static_cast<int>(kernel.shared_bytes(scan.hidden, scan.columns));
  const auto blocks = static_cast<unsigned>(scan.directions * scan.slices * scan.blocks);
  cudaError_t status = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return error_of(status, "shared memory of the persistent kernel");
  Scan argument = scan;
  void* arguments[] = {&argument};
  // Cooperative: all blocks are on the GPU at once, or the launch fails; they wait for one another.
  status = cudaLaunchCooperativeKernel(kernel.function, dim3(blocks), dim3(kThreads), arguments, bytes, stream);
  return error_of(status, "launch of the persistent kernel");
}

}  // namespace rnnkit::cuda
