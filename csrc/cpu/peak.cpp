// Runs the loops of kernels/peak.cpp on several threads and measures their time.
#include "cpu/peak.h"

#include <c10/util/Exception.h>
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>

#include "cpu/isa.h"

namespace rnnkit {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kRepetitions = 2000;     // repetitions of the FMA loop between two reads of the clock
constexpr int64_t kBytesAtOnce = 4 << 20;  // min bytes read between two reads of the clock

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Repeats work() for `seconds`, and returns the sum of its results divided by the time.
template <class Work>
double rate(double seconds, const Work& work) {
  double done = 0, passed = 0;
  for (const auto start = Clock::now(); passed < seconds; passed = since(start)) done += work();
  return done / passed;
}

}  // namespace

double peak_gflops(c10::ScalarType type, int threads, double seconds) {
  MultiplyAdd loop = nullptr;
  if (type == c10::kFloat) loop = isa().peak.f32;
  if (type == c10::kDouble) loop = isa().peak.f64;
#ifdef RNNKIT_HAS_AVX512_BF16
  if (type == c10::kBFloat16 && bfloat16_kernels())
    loop = multiplies_bfloat16() ? avx512_bf16::bfloat16_peak() : isa().peak.f32;
#endif
  TORCH_CHECK(loop, "expected dtype to be one that these kernels multiply, got ", type);
  TORCH_CHECK(threads > 0, "expected threads to be positive, got ", threads);
  double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  total += rate(seconds, [&] { return static_cast<double>(loop(kRepetitions)); });
  return total / 1e9;
}

double read_bandwidth(int64_t bytes, int threads, double seconds) {
  TORCH_CHECK(bytes > 0, "expected bytes to be positive, got ", bytes);
  TORCH_CHECK(threads > 0, "expected threads to be positive, got ", threads);
  bytes = std::max(bytes / kReadGrain, int64_t{1}) * kReadGrain;
  const int64_t passes = std::max(kBytesAtOnce / bytes, int64_t{1});
  double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    constexpr std::align_val_t aligned{4096};
    auto* const buffer = static_cast<std::byte*>(::operator new(bytes, aligned));
    std::memset(buffer, 1, bytes);
#pragma omp barrier
    total += rate(seconds, [&] {
      isa().peak.read(buffer, bytes, passes);
      return static_cast<double>(bytes * passes);
    });
    ::operator delete(buffer, aligned);
  }
  return total;
}

}  // namespace rnnkit
