#pragma once

#include <c10/core/ScalarType.h>

namespace rnnkit {

// GFLOP/s of `threads` threads at once, measured for `seconds`.
double peak_gflops(at::ScalarType type, int threads, double seconds);

}  // namespace rnnkit
