// Threads and clock around the loops of kernels/peak.cpp; benchmarks state rnnkit's speed as a share of what they give.
#include "cpu/peak.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>

namespace rnnkit {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kRepetitions = 2000;     // of multiplying and adding, between two looks at the clock
constexpr int64_t kBytesAtOnce = 4 << 20;  // likewise, of reading

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// What work() does a second, in its own unit, when it is repeated for `seconds`.
template <class Work>
double rate(double seconds, const Work& work) {
  double done = 0, passed = 0;
  for (const auto start = Clock::now(); passed < seconds; passed = since(start)) done += work();
  return done / passed;
}

}  // namespace

double gflops(MultiplyAdd loop, int threads, double seconds) {
  double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  total += rate(seconds, [&] { return static_cast<double>(loop(kRepetitions)); });
  return total / 1e9;
}

double bytes_per_second(Read loop, int64_t bytes, int threads, double seconds) {
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
      loop(buffer, bytes, passes);
      return static_cast<double>(bytes * passes);
    });
    ::operator delete(buffer, aligned);
  }
  return total;
}

}  // namespace rnnkit
