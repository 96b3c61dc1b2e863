// Which kernels run on this CPU.
#pragma once

#include <string>
#include <string_view>
#include <type_traits>

#include "cpu/kernels/peak.h"
#include "cpu/layer.h"

namespace rnnkit {

// What was built for one instruction set.
struct Isa {
  std::string name;
  CellTable cells;
  PeakLoops peak;
};

// The best that was built and that this CPU runs, as torch sees it (ATEN_CPU_CAPABILITY can lower it).
const Isa& isa();

// Raises for a name that is no cell's.
const CellKernels& find_cell(std::string_view name);

// Kernels that multiply bfloat16 directly, in the order of the cells; null where this CPU cannot.
const Kernels<BFloat16>* bfloat16_kernels();

// Whether bfloat16 is multiplied directly, and not as float. A CPU that has AMX takes twice as long for a vector of
// pairs of bfloat16 as for two vectors of float (docs/performance.md). RNNKIT_BFLOAT16=direct or float decides.
bool multiplies_bfloat16();

template <class S>
const Kernels<S>& kernels_of(const CellKernels& cell) {
  if constexpr (std::is_same_v<S, double>)
    return cell.f64;
  else if constexpr (std::is_same_v<S, float>)
    return cell.f32;
  else
    return bfloat16_kernels()[&cell - isa().cells.begin];
}

}  // namespace rnnkit
