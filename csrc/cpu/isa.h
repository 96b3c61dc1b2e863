// Chooses the kernels for this CPU.
#pragma once

#include <string>
#include <string_view>
#include <type_traits>

#include "cpu/interpreter.h"
#include "cpu/kernels/peak.h"
#include "cpu/layer.h"

namespace rnnkit {

// The kernels built for one ISA.
struct Isa {
  std::string name;
  CellTable cells;
  KernelsOfCell registered;  // of every registered cell
  PeakLoops peak;
  Interpreter interpreter;
};

// The best ISA that was built and that torch sees on this CPU. ATEN_CPU_CAPABILITY can lower it.
const Isa& isa();

// The built-in or registered cell of this name. Of a name that is a graph's JSON, which begins with a brace, Python
// registers the cell here at the first call. Throws if there is none. The result stays valid.
const CellKernels& find_cell(std::string_view name);

// Calls rnnkit.graph.kernels.register, which calls register_cell. In register.cpp.
void register_graph(std::string_view name);

// Makes find_cell find a cell, for all threads and for good; its name and its units are set here. Throws if it cannot
// be a cell, or if there is another one of this name. Of one that is registered again the first functions stay.
void register_cell(const std::string& name, const RegisteredCell& cell, bool projects);

// The kernels that multiply bfloat16 directly, in the order of the built-in cells; null if this CPU cannot run them.
const Kernels<BFloat16>* bfloat16_kernels();

// Whether bfloat16 is multiplied directly, and not as float. By default it is not on CPUs with AMX, which take twice as
// long for a vector of pairs of bfloat16 as for two vectors of float (docs/performance.md). The environment variable
// RNNKIT_BFLOAT16, direct or float, overrides the default.
bool multiplies_bfloat16();

template <class S>
const Kernels<S>& kernels_of(const CellKernels& cell) {
  if constexpr (std::is_same_v<S, double>)
    return cell.kernels.f64;
  else if constexpr (std::is_same_v<S, float>)
    return cell.kernels.f32;
  else
    return bfloat16_kernels()[&cell - isa().cells.begin];
}

}  // namespace rnnkit
