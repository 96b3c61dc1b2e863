// Loops that measure what one core can do at most, called by csrc/cpu/peak.cpp. They are compiled once for each
// instruction set and know nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rnnkit {

// Multiplies and adds `repetitions` times in registers; returns the floating-point operations done.
using MultiplyAdd = int64_t (*)(int64_t repetitions);

// Reads `bytes`, a multiple of kReadGrain, from `from` on, `passes` times over. `from` is aligned to 64 bytes.
using Read = void (*)(const std::byte* from, int64_t bytes, int64_t passes);
constexpr int64_t kReadGrain = 512;

struct PeakLoops {
  MultiplyAdd f32, f64;
  Read read;
};

namespace baseline {
PeakLoops peak_loops();
}
namespace avx2 {
PeakLoops peak_loops();
}
namespace avx512 {
PeakLoops peak_loops();
}
namespace avx512_bf16 {
MultiplyAdd bfloat16_peak();
}

}  // namespace rnnkit
