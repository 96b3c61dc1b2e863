// What this machine can do at most on several threads at once; benchmarks state speed as a share of it.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace rnnkit {

// GFLOP/s of `threads` threads together that only multiply and add, measured for `seconds`.
double peak_gflops(c10::ScalarType type, int threads, double seconds);

// Bytes a second that `threads` threads together read, each from `bytes` of its own, measured for `seconds`.
double read_bandwidth(int64_t bytes, int threads, double seconds);

}  // namespace rnnkit
