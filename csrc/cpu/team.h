// Threads of one parallel region: how they meet, how they treat denormals, and how they end early.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <new>

#include "common/lanes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rnnkit::RNNKIT_CAPABILITY {

// Waits by spinning, since a step lasts microseconds, but not for long: when more threads are wanted than the
// machine has, a member that only spins keeps the others from running.
class Barrier {
 public:
  explicit Barrier(int members) : members_(members) {}

  void wait() {
    if (members_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins > kSpins) {
        sched_yield();
        continue;
      }
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  }

 private:
  static constexpr int kSpins = 2000;
  const int members_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

// Sets whether this thread's operations take denormals for 0, in this scope.
class DenormalsAreZero {
 public:
#if defined(__x86_64__)
  explicit DenormalsAreZero(bool are) : before_(_mm_getcsr()) { _mm_setcsr(are ? before_ | kBits : before_ & ~kBits); }
  ~DenormalsAreZero() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kBits = 0x8040;
  unsigned before_;
#elif defined(__aarch64__)
  explicit DenormalsAreZero(bool are) {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(are ? before_ | kBits : before_ & ~kBits));
  }
  ~DenormalsAreZero() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  static constexpr uint64_t kBits = 1ull << 24;
  uint64_t before_;
#else
  explicit DenormalsAreZero(bool) {}
#endif
};

// Ends a long call early where the user wants that (Ctrl-C). The calling thread asks, every 20 ms; all threads stop.
class Stop {
 public:
  // `work`: the multiply-adds of a visit. Short visits do not look at the clock each.
  Stop(bool (*wants_to_stop)(), double work)
      : wants_to_stop_(wants_to_stop), stride_(1 + static_cast<int64_t>(1e6 / (work + 100))) {}

  // Whether visit `visit` is not to begin. Threads that meet after each visit stop before the same one: what the
  // calling thread, number 0, hears before a visit holds from the visit after the next on.
  bool before(int64_t visit, int thread, bool meets) {
    if (wants_to_stop_ == nullptr) return false;
    if (thread == 0 && visit % stride_ == 0 && first_.load(std::memory_order_relaxed) == kNever && is_due()) {
      const DenormalsAreZero as_elsewhere(false);  // a signal's handler may compute
      if (wants_to_stop_()) first_.store(visit + 2, std::memory_order_release);
    }
    const int64_t first = first_.load(std::memory_order_acquire);
    return meets ? visit >= first : first < kNever;
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

// Runs body(thread, threads, barrier) on up to `threads` threads at once; on one if already in a parallel region.
template <class Body>
void parallel(int threads, const Body& body) {
  if (threads <= 1 || omp_in_parallel()) {
    const DenormalsAreZero flush(true);  // they are slow on many CPUs and carry nothing here
    Barrier alone(1);
    body(0, 1, alone);
    return;
  }
  alignas(64) char place[sizeof(Barrier)];
  Barrier* barrier = nullptr;
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads();
#pragma omp single
    barrier = new (place) Barrier(team);
    const DenormalsAreZero flush(true);
    body(omp_get_thread_num(), team, *barrier);
  }
}

}  // namespace rnnkit::RNNKIT_CAPABILITY
