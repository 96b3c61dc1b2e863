// Measures this machine's peak arithmetic and bandwidth on several threads; benchmarks give speeds as a share of it.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace rnnkit {

// GFLOP/s that `threads` threads reach together if they only multiply and add, measured for `seconds`.
double peak_gflops(c10::ScalarType type, int threads, double seconds);

// Bytes a second that `threads` threads read together, each from its own buffer of `bytes`, measured for `seconds`.
double read_bandwidth(int64_t bytes, int threads, double seconds);

}  // namespace rnnkit
