// What this machine's matrix multiplication can reach: ATen's brgemm, that is oneDNN's micro-kernel, on operands that
// stay in L2. Benchmarks state rnnkit's speed as a share of it; no layer uses it.
#include "cpu/peak.h"

#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>
#include <omp.h>

#include <chrono>

namespace rnnkit {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kRows = 64, kColumns = 64, kDepth = 256;
constexpr double kFlops = 2.0 * kRows * kColumns * kDepth;

template <class S>
double of_one_thread(double seconds) {
  const auto type = c10::CppTypeToScalarType<S>::value;
  const at::Tensor a = at::ones({kRows, kDepth}, type), b = at::ones({kDepth, kColumns}, type);
  const at::Tensor c = at::zeros({kRows, kColumns}, at::kFloat);
  const bool in_pairs = type != at::kFloat;
  int64_t products = 0;
  double passed = 0;
  for (const auto start = Clock::now(); passed < seconds;
       passed = std::chrono::duration<double>(Clock::now() - start).count())
    for (int i = 0; i < 64; ++i, ++products)
      at::native::cpublas::brgemm(kRows, kColumns, kDepth, kDepth, kColumns, kColumns, false, a.const_data_ptr<S>(),
                                  b.const_data_ptr<S>(), c.mutable_data_ptr<float>(), in_pairs);
  at::native::cpublas::brgemm_release(in_pairs);
  return products * kFlops / passed / 1e9;
}

}  // namespace

double peak_gflops(at::ScalarType type, int threads, double seconds) {
  TORCH_CHECK(type == at::kFloat || (type == at::kBFloat16 && at::native::cpublas::could_pack(type)),
              "expected dtype to be one that brgemm multiplies on this CPU, got ", type);
  TORCH_CHECK(threads > 0, "expected threads to be positive, got ", threads);
  double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  total += type == at::kFloat ? of_one_thread<float>(seconds) : of_one_thread<at::BFloat16>(seconds);
  return total;
}

}  // namespace rnnkit
