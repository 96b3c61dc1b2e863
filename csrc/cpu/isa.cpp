#include "cpu/isa.h"

#include <ATen/Context.h>
#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <cstdlib>

namespace rnnkit {
namespace {

Isa choose_isa() {
  [[maybe_unused]] const std::string name = at::get_cpu_capability();
#ifdef RNNKIT_HAS_AVX512
  if (name == "AVX512") return {"avx512", avx512::cells(), avx512::peak_loops()};
#endif
#ifdef RNNKIT_HAS_AVX2
  if (name == "AVX512" || name == "AVX2") return {"avx2", avx2::cells(), avx2::peak_loops()};
#endif
  return {"baseline", baseline::cells(), baseline::peak_loops()};
}

}  // namespace

const Isa& isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

const CellKernels& find_cell(std::string_view name) {
  for (const CellKernels* cell = isa().cells.begin; cell != isa().cells.end; ++cell)
    if (name == cell->name) return *cell;
  TORCH_CHECK(false, "expected cell to be the name of a cell, got '", std::string(name), "'");
}

const Kernels<BFloat16>* bfloat16_kernels() {
#ifdef RNNKIT_HAS_AVX512_BF16
  static const bool can = isa().name == "avx512" && __builtin_cpu_supports("avx512bf16");
  if (can) return avx512_bf16::bfloat16_cells();
#endif
  return nullptr;
}

bool multiplies_bfloat16() {
  static const bool does = [] {
    if (bfloat16_kernels() == nullptr) return false;
    if (const char* variable = std::getenv("RNNKIT_BFLOAT16"); variable != nullptr && *variable != 0) {
      const std::string chosen = variable;
      TORCH_CHECK(chosen == "direct" || chosen == "float", "expected RNNKIT_BFLOAT16 to be direct or float, got ",
                  chosen);
      return chosen == "direct";
    }
#if defined(__x86_64__)
    if (__builtin_cpu_supports("amx-bf16")) return false;
#endif
    return true;
  }();
  return does;
}

}  // namespace rnnkit
