// The launch of a persistent kernel, and cuBLAS's products.
#include <cuda_runtime.h>
#include <library_types.h>

#include "cuda/kernels.h"

// Of cublas_api.h, which a toolkit need not have; torch has loaded the library.
extern "C" int cublasGemmEx(void* handle, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha,
                            const void* a, cudaDataType_t a_type, int a_stride, const void* b, cudaDataType_t b_type,
                            int b_stride, const void* beta, void* c, cudaDataType_t c_type, int c_stride,
                            int compute_type, int algorithm);
extern "C" int cublasGemmStridedBatchedEx(void* handle, int transpose_a, int transpose_b, int m, int n, int k,
                                          const void* alpha, const void* a, cudaDataType_t a_type, int a_stride,
                                          long long next_a, const void* b, cudaDataType_t b_type, int b_stride,
                                          long long next_b, const void* beta, void* c, cudaDataType_t c_type,
                                          int c_stride, long long next_c, int count, int compute_type, int algorithm);

namespace rnnkit::cuda {
namespace {

std::string error_of(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // so that it is not reported once more
  return std::string(what) + ": " + cudaGetErrorString(status);
}

}  // namespace

std::string launch_persistent(const Persistent& kernel, const PersistentScan& scan, Stream stream) {
  const auto blocks = static_cast<unsigned>(scan.directions * scan.slices * scan.blocks);
  // As much as there is, always: another thread may launch the same kernel for other sizes.
  int device = 0, most = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (status != cudaSuccess) return error_of(status, "shared memory of the persistent kernel");
  const int64_t shared_bytes = kernel.shared_bytes(scan);
  if (shared_bytes > most)
    return "a block of the persistent kernel needs " + std::to_string(shared_bytes) +
           " bytes of shared memory, and this GPU has " + std::to_string(most);
  cudaLaunchAttribute attribute{};
  if (kernel.cluster) {
    cudaFuncAttributes attributes{};
    status = cudaFuncGetAttributes(&attributes, kernel.function);
    if (status != cudaSuccess) return error_of(status, "attributes of the persistent kernel");
    if (attributes.ptxVersion < 90) return "the kernels were built for GPUs that have no clusters";
    // More than 8 blocks are not portable: the plan asks for them only where there can be so many.
    status = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status != cudaSuccess) return error_of(status, "cluster of the persistent kernel");
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(scan.blocks);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else {
    // All blocks are on the GPU at once, or the launch fails; they wait for one another.
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  PersistentScan argument = scan;
  void* arguments[] = {&argument};
  status = cudaLaunchKernelExC(&config, kernel.function, arguments);
  return error_of(status, "launch of the persistent kernel");
}

std::string multiply(const Product& product, void* blas) {
  constexpr int kCompute32 = 68, kCompute32Tf32 = 77, kCompute64 = 70, kDefaultAlgorithm = -1;
  constexpr cudaDataType_t types[] = {CUDA_R_16BF, CUDA_R_16F, CUDA_R_32F, CUDA_R_64F};
  const cudaDataType_t type = types[static_cast<int>(product.type)];
  const bool wide = product.type == Type::float64;
  const int compute = wide ? kCompute64 : type == CUDA_R_32F && !product.precise ? kCompute32Tf32 : kCompute32;
  const float one = 1, zero = 0;
  const double wide_one = 1, wide_zero = 0;
  const void* alpha = wide ? static_cast<const void*>(&wide_one) : &one;
  const void* beta = wide ? static_cast<const void*>(&wide_zero) : &zero;
  // cuBLAS goes column by column: to it every matrix is its transpose.
  const int m = int(product.columns), n = int(product.rows), k = int(product.depth);
  const Matrices &a = product.b, &b = product.a, &c = product.c;
  const int a_stride = int(a.stride), b_stride = int(b.stride), c_stride = int(c.stride);
  const int status =
      product.count == 1
          ? cublasGemmEx(blas, product.transposed, 0, m, n, k, alpha, a.data, type, a_stride, b.data, type, b_stride,
                         beta, c.data, type, c_stride, compute, kDefaultAlgorithm)
          : cublasGemmStridedBatchedEx(blas, product.transposed, 0, m, n, k, alpha, a.data, type, a_stride, a.next,
                                       b.data, type, b_stride, b.next, beta, c.data, type, c_stride, c.next,
                                       product.count, compute, kDefaultAlgorithm);
  return status == 0 ? "" : "cuBLAS: status " + std::to_string(status);
}

}  // namespace rnnkit::cuda
