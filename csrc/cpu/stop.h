// Ends a long call early if the user wants that (Ctrl-C): the calling thread asks every 20 ms, and all threads stop.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "cpu/team.h"

namespace rnnkit::RNNKIT_CAPABILITY {

class Stop {
 public:
  // `work`: the multiply-adds of a step. The clock is looked at in every step only if they are long.
  Stop(bool (*wants_to_stop)(), double work)
      : wants_to_stop_(wants_to_stop), stride_(1 + static_cast<int64_t>(1e6 / (work + 100))) {}

  // Whether the call is to end before step `step`. `thread`: 0 is the calling thread, the only one that asks. `meets`:
  // the threads meet after each step. A stop that thread 0 hears of at step s then takes effect at s + 2, so that all
  // threads see it before the same step.
  bool before(int64_t step, int thread, bool meets) {
    if (wants_to_stop_ == nullptr) return false;
    if (thread == 0 && step % stride_ == 0 && first_.load(std::memory_order_relaxed) == kNever && is_due()) {
      const DenormalsAreZero as_elsewhere(false);  // a signal's handler may compute
      if (wants_to_stop_()) first_.store(step + 2, std::memory_order_release);
    }
    const int64_t first = first_.load(std::memory_order_acquire);
    return meets ? step >= first : first < kNever;
  }

 private:
  static constexpr int64_t kNever = INT64_MAX;
  using Clock = std::chrono::steady_clock;

  bool is_due() {
    const Clock::time_point now = Clock::now();
    if (asked_ == Clock::time_point()) asked_ = now;
    if (now - asked_ < std::chrono::milliseconds(20)) return false;
    asked_ = now;
    return true;
  }

  bool (*const wants_to_stop_)();
  const int64_t stride_;
  Clock::time_point asked_;  // of the calling thread
  std::atomic<int64_t> first_{kNever};
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
