// Work cut into parts, for tiles and for threads.
#pragma once

#include <cstdint>

#include "common/lanes.h"

namespace rnnkit::RNNKIT_CAPABILITY {

// In place of std::min and std::max: the linker keeps one copy of an inline function of std, and if that is the one
// compiled here for AVX-512, an older CPU crashes in code that has nothing to do with these kernels.
constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Part `index` of `parts` of [0, total), which are as even as multiples of `grain` can be.
inline Range range_of(int64_t total, int64_t index, int64_t parts, int64_t grain = 1) {
  const int64_t grains = (total + grain - 1) / grain;
  const int64_t begin = grains * index / parts * grain, end = grains * (index + 1) / parts * grain;
  return {min_of(begin, total), min_of(end, total)};
}

}  // namespace rnnkit::RNNKIT_CAPABILITY
