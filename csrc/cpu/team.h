// A parallel region: the barrier at which its threads meet, and how they treat denormals.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <new>

#include "common/lanes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rnnkit::RNNKIT_CAPABILITY {

// Waits by spinning, since a step lasts microseconds, but only briefly: if there are more threads than the machine has
// free, a thread that spins keeps the others from running.
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

// Sets whether this thread's operations take denormals for 0, for the life of the object.
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

// Runs body(thread, threads, barrier) on up to `threads` threads at once; on one if already in a parallel region.
template <class Body>
void parallel(int threads, const Body& body) {
  if (threads <= 1 || omp_in_parallel()) {
    const DenormalsAreZero flush(true);  // denormals are slow on many CPUs, and too small to matter here
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
