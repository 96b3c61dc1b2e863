#include "cpu/isa.h"

#include <ATen/Context.h>
#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <tuple>

namespace rnnkit {
namespace {

Isa choose_isa() {
  [[maybe_unused]] const std::string name = at::get_cpu_capability();
#ifdef RNNKIT_HAS_AVX512
  if (name == "AVX512")
    return {"avx512", avx512::cells(), avx512::registered_cells(), avx512::peak_loops(), avx512::interpreter()};
#endif
#ifdef RNNKIT_HAS_AVX2
  if (name == "AVX512" || name == "AVX2")
    return {"avx2", avx2::cells(), avx2::registered_cells(), avx2::peak_loops(), avx2::interpreter()};
#endif
  return {"baseline", baseline::cells(), baseline::registered_cells(), baseline::peak_loops(), baseline::interpreter()};
}

// A registered cell. It points into itself, and is never moved.
struct Entry {
  std::string name;
  RegisteredCell cell;
  CellKernels kernels;
};

struct Registry {
  std::shared_mutex mutex;
  std::map<std::string, Entry, std::less<>> entries;
};

Registry& registry() {
  static Registry& registry = *new Registry;  // never removed: threads may still call when the process ends
  return registry;
}

const CellKernels* find_built_in(std::string_view name) {
  for (const CellKernels* cell = isa().cells.begin; cell != isa().cells.end; ++cell)
    if (name == cell->name) return cell;
  return nullptr;
}

const CellKernels* find_registered(std::string_view name) {
  const std::shared_lock lock(registry().mutex);
  const auto found = registry().entries.find(name);
  return found == registry().entries.end() ? nullptr : &found->second.kernels;
}

// A cell's name in the text of an error; of a graph's JSON the beginning.
std::string shown(const std::string& name) {
  constexpr size_t kMost = 60;
  return name.size() <= kMost ? name : name.substr(0, kMost) + "...";
}

void check(const std::string& name, const RegisteredCell& cell, bool projects) {
  TORCH_CHECK(!name.empty(), "expected the name of a cell, got ''");
  TORCH_CHECK(find_built_in(name) == nullptr, "expected a name that no built-in cell has, got '", name, "'");
  const auto check_count = [&](const char* what, int64_t count, int64_t least, int64_t most) {
    TORCH_CHECK(count >= least && count <= most, "expected ", shown(name), " to have ", least, " to ", most, " ", what,
                ", got ", count);
  };
  check_count("gates", cell.gates, 1, kMaxGates);
  check_count("recurrent gates", cell.recurrent, 0, kMaxGates);
  check_count("late gates", cell.late, 0, cell.recurrent);
  check_count("states", cell.states, 1, kMaxStates);
  check_count("saved values", cell.saved, 0, kMaxSaved);
  check_count("parameters", cell.parameters, 0, kMaxSaved);
  check_count("gradients of gates", cell.grads, std::max<int64_t>(1, cell.recurrent), cell.gates + cell.recurrent);
  for (int64_t g = 0; g < cell.gates; ++g)
    TORCH_CHECK(cell.input_grad[g] >= 0 && cell.input_grad[g] < cell.grads, "expected the gradients of ", shown(name),
                "'s input gates to be among its ", cell.grads, ", got number ", cell.input_grad[g]);
  TORCH_CHECK(!projects || !(cell.uses_h || cell.uses_previous_h), "expected ", shown(name),
              " to read neither h nor the previous h, since it is to support projections");
  TORCH_CHECK(!projects || cell.late == 0, "expected ", shown(name),
              " to have no late gates, since it is to support projections, got ", cell.late);
  const auto complete = [&](const auto& of) {
    return of.forward != nullptr && of.backward != nullptr && (cell.states == 1 || of.grad_states != nullptr) &&
           (!projects || of.output != nullptr) &&
           (cell.late == 0 || (of.operand != nullptr && of.late_grads != nullptr));
  };
  TORCH_CHECK(complete(cell.f32) && complete(cell.f64), "expected addresses of all functions of ", shown(name),
              ", got 0");
}

bool are_same(const RegisteredCell& a, const RegisteredCell& b) {
  const auto description = [](const RegisteredCell& cell) {
    return std::make_tuple(cell.gates, cell.recurrent, cell.late, cell.states, cell.saved, cell.grads, cell.parameters,
                           cell.uses_h, cell.uses_previous_h);
  };
  return description(a) == description(b) && std::equal(a.input_grad, a.input_grad + a.gates, b.input_grad);
}

}  // namespace

void register_cell(const std::string& name, const RegisteredCell& cell, bool projects) {
  check(name, cell, projects);
  const std::unique_lock lock(registry().mutex);
  const auto [place, is_new] = registry().entries.try_emplace(name);
  Entry& entry = place->second;
  if (!is_new) {
    TORCH_CHECK(are_same(entry.cell, cell) && entry.kernels.projects == projects, "expected ", shown(name),
                " to be described as before, since a cell of this name is registered, got another description");
    return;
  }
  entry.name = name;
  entry.cell = cell;
  entry.cell.name = entry.name.c_str();
  entry.cell.early = cell.recurrent - cell.late;
  entry.cell.others = cell.states - 1;
  entry.cell.columns = cell.grads + cell.parameters + (cell.late > 0 ? 1 : 0);
  // As many as make a panel of up to 128 columns.
  entry.cell.units = std::clamp<int64_t>(128 / std::max(cell.gates, cell.recurrent) / 16 * 16, 16, kMostUnits);
  entry.kernels = {.name = entry.cell.name,
                   .gates = cell.gates,
                   .recurrent = cell.recurrent,
                   .states = cell.states,
                   .saved = cell.saved,
                   .parameters = cell.parameters,
                   .projects = projects,
                   .has_source = false,
                   .uses_h = cell.uses_h,
                   .input_grad = {},
                   .registered = &entry.cell,
                   .kernels = isa().registered};
  std::copy_n(cell.input_grad, cell.gates, entry.kernels.input_grad);
}

const Isa& isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

const CellKernels& find_cell(std::string_view name) {
  if (const CellKernels* cell = find_built_in(name); cell != nullptr) return *cell;
  if (const CellKernels* cell = find_registered(name); cell != nullptr) return *cell;
  if (name.starts_with('{')) {
    register_graph(name);
    if (const CellKernels* cell = find_registered(name); cell != nullptr) return *cell;
  }
  TORCH_CHECK(false, "expected cell to be the name of a cell, got '", shown(std::string(name)), "'");
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
