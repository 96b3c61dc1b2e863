// What this machine can do at most on several threads at once: threads and clock around the loops of kernels/peak.cpp.
#pragma once

#include "cpu/kernels/peak.h"

namespace rnnkit {

// GFLOP/s of `threads` threads together, measured for `seconds`.
double gflops(MultiplyAdd loop, int threads, double seconds);

// Bytes a second that `threads` threads together read, each from `bytes` of its own, measured for `seconds`.
double bytes_per_second(Read loop, int64_t bytes, int threads, double seconds);

}  // namespace rnnkit
