// A block and a warp on the GPU: how they load, multiply, and wait for one another. host.h has the same for the host.
#pragma once

#include "cuda/scan.h"

namespace rnnkit::cuda {

__device__ __forceinline__ void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1, BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1, Half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1, float) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// What TF32 leaves of a float, as TF32.
__device__ __forceinline__ uint32_t upper(uint32_t word) {
  return __float_as_uint(rounded_to_tf32(__uint_as_float(word)));
}
__device__ __forceinline__ uint32_t lower(uint32_t word) {
  return upper(__float_as_uint(__uint_as_float(word) - __uint_as_float(upper(word))));
}

struct DeviceWarp {
  using Vector = uint4;     // 16 bytes a lane
  using Sums = float[4];    // 16 rows x 8 columns
  int index, lane;

  static __device__ __forceinline__ Vector zero() { return {0, 0, 0, 0}; }
  __device__ __forceinline__ void clear(Sums& sums) const { sums[0] = sums[1] = sums[2] = sums[3] = 0; }

  // A piece of shared memory.
  __device__ __forceinline__ Vector read(const std::byte* piece) const {
    return reinterpret_cast<const uint4*>(piece)[lane];
  }
  // A piece that other blocks wrote: from the cache that all share.
  __device__ __forceinline__ Vector read_exchanged(const std::byte* piece) const {
    return __ldcg(reinterpret_cast<const uint4*>(piece) + lane);
  }

  // sums += [a0; a1] b for one chunk: a0, a1 are 8 rows of weights each, b 8 rows of the batch.
  template <class S>
  __device__ __forceinline__ void multiply_add(Sums& sums, const Vector& a0, const Vector& a1, const Vector& b,
                                               bool precise) const {
    if constexpr (std::is_same_v<S, float>) {
      if (precise) {  // the small products first; that of both lower parts is below a float's rounding
        multiply(sums, lower(a0.x), lower(a1.x), lower(a0.y), lower(a1.y), upper(b.x), upper(b.y), S());
        multiply(sums, upper(a0.x), upper(a1.x), upper(a0.y), upper(a1.y), lower(b.x), lower(b.y), S());
        multiply(sums, upper(a0.x), upper(a1.x), upper(a0.y), upper(a1.y), upper(b.x), upper(b.y), S());
        multiply(sums, lower(a0.z), lower(a1.z), lower(a0.w), lower(a1.w), upper(b.z), upper(b.w), S());
        multiply(sums, upper(a0.z), upper(a1.z), upper(a0.w), upper(a1.w), lower(b.z), lower(b.w), S());
        multiply(sums, upper(a0.z), upper(a1.z), upper(a0.w), upper(a1.w), upper(b.z), upper(b.w), S());
        return;
      }
    }
    multiply(sums, a0.x, a1.x, a0.y, a1.y, b.x, b.y, S());
    multiply(sums, a0.z, a1.z, a0.w, a1.w, b.z, b.w, S());
  }

  // Into [rows][stride] floats at `to`; rows from 8 on only if `both`.
  __device__ __forceinline__ void store(const Sums& sums, float* to, int stride, bool both) const {
    float* upper_row = to + (lane / 4) * stride + lane % 4 * 2;
    *reinterpret_cast<float2*>(upper_row) = make_float2(sums[0], sums[1]);
    if (both) *reinterpret_cast<float2*>(upper_row + 8 * stride) = make_float2(sums[2], sums[3]);
  }

  // Until blocks first..last have completed `epoch` exchanges. What they wrote before is visible to the warp then: each
  // lane acquires what its block released, and the lanes' barrier hands it on. A block that never comes stops the
  // program with an error instead of the GPU.
  __device__ __forceinline__ void wait(const uint32_t* flags, int first, int last, uint32_t epoch) const {
    for (int block = first + lane; block <= last; block += 32) {
      const uint32_t* flag = flags + block * kFlagStride;
      for (uint32_t looks = 0;; ++looks) {
        uint32_t seen;
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
        if (seen >= epoch) break;
        constexpr uint32_t kPatience = 1u << 25;  // more than ten seconds
        if (looks > kPatience) __trap();
      }
    }
    __syncwarp();
  }
};

struct DeviceBlock {
  int index;

  template <class R>
  using PerThread = R;

  template <class R, class Body>
  __device__ __forceinline__ void threads(R& registers, const Body& body) const {
    body(int(threadIdx.x), registers);
  }
  template <class Body>
  __device__ __forceinline__ void warps(const Body& body) const {
    body(DeviceWarp{int(threadIdx.x / 32), int(threadIdx.x % 32)});
  }
  __device__ __forceinline__ void sync() const { __syncthreads(); }

  // Tells the others that this block's part of an exchange is written, by all its threads, before the last sync().
  __device__ __forceinline__ void release(uint32_t* flag, uint32_t epoch) const {
    if (threadIdx.x == 0) asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(epoch) : "memory");
  }
};

}  // namespace rnnkit::cuda
