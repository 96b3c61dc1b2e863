// A block and a warp on the GPU: how they load, multiply, and wait for one another. host.h has the same for the host.
#pragma once

#include "cuda/scan.h"

namespace rnnkit::cuda {

__device__ __forceinline__ void multiply(float (&sum)[4], const uint4& a, uint32_t b0, uint32_t b1, BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&sum)[4], const uint4& a, uint32_t b0, uint32_t b1, Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&sum)[4], const uint4& a, uint32_t b0, uint32_t b1, float) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// A float is the sum of two that TF32 can hold, but for its last bits. An infinity has no second part, and is not
// multiplied with another's: infinity times a small number of the other sign, or zero, would make its product NaN.
__device__ __forceinline__ uint32_t finite(float value) {
  return fabsf(value) < __int_as_float(0x7f800000) ? __float_as_uint(value) : 0;
}
__device__ __forceinline__ uint32_t upper(uint32_t word) {
  return __float_as_uint(rounded_to_tf32(__uint_as_float(word)));
}
__device__ __forceinline__ uint32_t finite_upper(uint32_t word) { return finite(__uint_as_float(upper(word))); }
__device__ __forceinline__ uint32_t lower(uint32_t word) {
  return upper(finite(__uint_as_float(word) - __uint_as_float(upper(word))));
}
__device__ __forceinline__ uint4 upper(const uint4& words) {
  return {upper(words.x), upper(words.y), upper(words.z), upper(words.w)};
}
__device__ __forceinline__ uint4 finite_upper(const uint4& words) {
  return {finite_upper(words.x), finite_upper(words.y), finite_upper(words.z), finite_upper(words.w)};
}
__device__ __forceinline__ uint4 lower(const uint4& words) {
  return {lower(words.x), lower(words.y), lower(words.z), lower(words.w)};
}

struct DeviceWarp {
  using Vector = uint4;   // 16 bytes a lane
  using Sums = float[4];  // 16 rows x 8 columns
  int index, lane;

  // Words 0 and 1, 2 and 3 of 8 rows, beside 8 rows of zeros.
  static __device__ __forceinline__ Vector upper01(const Vector& words) { return {words.x, 0, words.y, 0}; }
  static __device__ __forceinline__ Vector upper23(const Vector& words) { return {words.z, 0, words.w, 0}; }
  __device__ __forceinline__ void clear(Sums& sums) const { sums[0] = sums[1] = sums[2] = sums[3] = 0; }

  // This lane's 16 bytes of a fragment: lanes() says where they are; read() takes them from shared memory, and
  // read_exchanged() takes what other blocks wrote from L2, past L1.
  template <class Byte>
  __device__ __forceinline__ Byte* lanes(Byte* fragment) const {
    return fragment + lane * kVectorBytes;
  }
  __device__ __forceinline__ Vector read(const std::byte* from) const { return *reinterpret_cast<const uint4*>(from); }
  __device__ __forceinline__ Vector read_exchanged(const std::byte* from) const {
    return __ldcg(reinterpret_cast<const uint4*>(from));
  }

  // sums += a b for one slab: a is 16 rows of weights, their words 0 and 1, and 2 and 3; b 8 rows of the batch.
  template <class S>
  __device__ __forceinline__ void multiply_add(Sums& sums, const Vector& a01, const Vector& a23, const Vector& b,
                                               bool precise) const {
    if constexpr (std::is_same_v<S, float>) {
      // The small products first; that of both lower parts is below a float's rounding. The tensor core's own sums are
      // cut off rather than rounded, so they are kept short.
      if (precise) {
        Sums part = {0, 0, 0, 0};
        multiply(part, lower(a01), finite_upper(b.x), finite_upper(b.y), S());
        multiply(part, finite_upper(a01), lower(b.x), lower(b.y), S());
        multiply(part, upper(a01), upper(b.x), upper(b.y), S());
        multiply(part, lower(a23), finite_upper(b.z), finite_upper(b.w), S());
        multiply(part, finite_upper(a23), lower(b.z), lower(b.w), S());
        multiply(part, upper(a23), upper(b.z), upper(b.w), S());
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[k] += part[k];
        return;
      }
    }
    multiply(sums, a01, b.x, b.y, S());
    multiply(sums, a23, b.z, b.w, S());
  }

  // Into [rows][stride] floats at `to`; rows from 8 on only if `both`.
  __device__ __forceinline__ void store(const Sums& sums, float* to, int stride, bool both) const {
    float* upper_row = to + (lane / 4) * stride + lane % 4 * 2;
    *reinterpret_cast<float2*>(upper_row) = make_float2(sums[0], sums[1]);
    if (both) *reinterpret_cast<float2*>(upper_row + 8 * stride) = make_float2(sums[2], sums[3]);
  }

  // Waits until blocks first..last have published `epoch` exchanges. What they wrote before is then visible to the warp:
  // each lane acquires what its block released, and the lanes' barrier hands it on. If a block never publishes, the
  // program ends with an error instead of hanging.
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

  // Publishes this block's part of an exchange, which all its threads wrote before the last sync().
  __device__ __forceinline__ void publish(uint32_t* flag, uint32_t epoch) const {
    if (threadIdx.x == 0) asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(epoch) : "memory");
  }

  // In a cluster: where block `rank` has what `shared` points to here; and its barrier, which also makes what was written
  // before arrive() visible after wait().
  template <class T>
  __device__ __forceinline__ T* peer(int rank, T* shared) const {
    T* found;
    asm("mapa.u64 %0, %1, %2;" : "=l"(found) : "l"(shared), "r"(rank));
    return found;
  }
  __device__ __forceinline__ void arrive() const {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  }
  __device__ __forceinline__ void wait() const { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
};

}  // namespace rnnkit::cuda
