// What one core can do at most with this instruction set: multiply and add in registers, read memory. Benchmarks state
// rnnkit's speed as a share of it; no layer uses it.
#include "cpu/kernels/peak.h"

#include "cpu/gemm.h"

// An operand of an asm in a vector register.
#if defined(__x86_64__) || defined(__i386__)
#define RNNKIT_IN_REGISTER "+x"
#elif defined(__aarch64__)
#define RNNKIT_IN_REGISTER "+w"
#else
#define RNNKIT_IN_REGISTER "+m"
#endif

namespace rnnkit::RNNKIT_CAPABILITY {
namespace {

// An empty asm hides the values that it names from the compiler, so that each product and each sum is computed.
template <class S>
RNNKIT_INLINE void multiply_add_once(typename Operand<S>::Values& a, typename Operand<S>::Values b,
                                     Vector<Sum<S>>& sum) {
  sum = Operand<S>::multiply_add(a, b, sum);
  asm volatile("" : RNNKIT_IN_REGISTER(sum), RNNKIT_IN_REGISTER(a));
}

template <class S>
constexpr S kOne{1};
template <>
constexpr BFloat16 kOne<BFloat16>{0x3f80};

// Two units of a latency of up to 6 cycles are kept busy by 12 sums that do not wait for each other. These are named,
// not an array, so that each is a register.
template <class S>
int64_t multiply_add(int64_t repetitions) {
  const S one_pair[2] = {kOne<S>, kOne<S>};
  auto a = Operand<S>::splat_pair(one_pair);
  auto b = a;
  asm volatile("" : RNNKIT_IN_REGISTER(a), RNNKIT_IN_REGISTER(b));
  Vector<Sum<S>> s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, s10{}, s11{};
  for (int64_t i = 0; i < repetitions; ++i) {
    multiply_add_once<S>(a, b, s0);
    multiply_add_once<S>(a, b, s1);
    multiply_add_once<S>(a, b, s2);
    multiply_add_once<S>(a, b, s3);
    multiply_add_once<S>(a, b, s4);
    multiply_add_once<S>(a, b, s5);
    multiply_add_once<S>(a, b, s6);
    multiply_add_once<S>(a, b, s7);
    multiply_add_once<S>(a, b, s8);
    multiply_add_once<S>(a, b, s9);
    multiply_add_once<S>(a, b, s10);
    multiply_add_once<S>(a, b, s11);
  }
  return repetitions * 12 * 2 * Operand<S>::pair * Operand<S>::lanes;
}

}  // namespace

#if defined(__AVX512BF16__)

MultiplyAdd bfloat16_peak() { return multiply_add<BFloat16>; }

#else

namespace {

void read_memory(const std::byte* from, int64_t bytes, int64_t passes) {
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes), may_alias));
  constexpr int kVectors = kReadGrain / kVectorBytes;
  for (int64_t pass = 0; pass < passes; ++pass) {
    Bits ored[8]{};
    for (int64_t at = 0; at < bytes; at += kReadGrain) {
      const Bits* vectors = reinterpret_cast<const Bits*>(from + at);
#pragma GCC unroll 32
      for (int i = 0; i < kVectors; ++i) ored[i % 8] |= vectors[i];
    }
    Bits all = (ored[0] | ored[1]) | (ored[2] | ored[3]) | (ored[4] | ored[5]) | (ored[6] | ored[7]);
    asm volatile("" : RNNKIT_IN_REGISTER(all) : : "memory");
  }
}

}  // namespace

PeakLoops peak_loops() { return {multiply_add<float>, multiply_add<double>, read_memory}; }

#endif

}  // namespace rnnkit::RNNKIT_CAPABILITY
