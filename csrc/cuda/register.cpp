// The GPU's scans as ops of torch, for rnnkit/gpu.py: unpacks tensors, finds the stream, launches. Built on torch's
// stable ABI, so that one binary serves every later torch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "cuda/stepwise.h"

namespace rnnkit::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;
using Optionals = std::vector<Optional>;

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return Type::bfloat16;
    case ScalarType::Half:
      return Type::half;
    case ScalarType::Float:
      return Type::float32;
    case ScalarType::Double:
      return Type::float64;
    default:
      STD_TORCH_CHECK(false, "expected a floating-point dtype that the CUDA kernels have");
  }
}

template <class S>
const std::vector<Persistent>* kernels_of(bool backward) {
  return backward ? &persistent_kernels<S, true>() : &persistent_kernels<S, false>();
}

const Persistent* find_persistent(std::string_view cell, Type type, bool backward, bool cluster, int units, int tiles) {
  const auto* const table = type == Type::bfloat16  ? kernels_of<BFloat16>(backward)
                            : type == Type::half    ? kernels_of<Half>(backward)
                            : type == Type::float32 ? kernels_of<float>(backward)
                                                    : nullptr;
  if (table == nullptr) return nullptr;
  for (const Persistent& kernel : *table)
    if (kernel.cell == cell && kernel.cluster == cluster && kernel.units == units && kernel.tiles == tiles)
      return &kernel;
  return nullptr;
}

const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
void* mutable_data(const Tensor& tensor) { return tensor.mutable_data_ptr(); }
const void* data(const Optional& tensor) { return tensor ? data(*tensor) : nullptr; }
void* mutable_data(const Optional& tensor) { return tensor ? mutable_data(*tensor) : nullptr; }

#if defined(RNNKIT_HOST)  // the host build takes CPU tensors
#define RNNKIT_KEY CPU
struct Guard {
  explicit Guard(const Tensor&) {}
};
Stream stream_of(const Tensor&) { return nullptr; }
void* blas_handle() { return nullptr; }
#else
#define RNNKIT_KEY CUDA
struct Guard {
  torch::stable::accelerator::DeviceGuard guard;
  explicit Guard(const Tensor& tensor) : guard(tensor.get_device_index()) {}
};
Stream stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}
void* blas_handle() {
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  return handle;
}
#endif

// Puts the data of a list over the cell's states, which is empty where there are none, into a field of each state.
template <class List, class Void>
void set_states(Scan& scan, const CellSizes& sizes, const char* name, const List& list, Void* State::* field) {
  STD_TORCH_CHECK(list.empty() || list.size() == size_t(sizes.states), "expected ", name, " of ", sizes.states,
                  " states or none, got ", list.size());
  for (size_t k = 0; k < list.size(); ++k) {
    if constexpr (std::is_const_v<Void>)
      scan.states[k].*field = data(list[k]);
    else
      scan.states[k].*field = mutable_data(list[k]);
  }
}

// Sets what sequences begin with, and are put back to.
void set_before(Scan& scan, const CellSizes& sizes, const Tensors& initial, const Optional& reset,
                const Tensors& reset_states) {
  set_states(scan, sizes, "initial", initial, &State::initial);
  scan.reset = static_cast<const bool*>(data(reset));
  set_states(scan, sizes, "reset_states", reset_states, &State::reset);
}

// Sets recurrent dropout and zoneout. kept: one after the other of the states whose zoneout is not 0.
void set_noise(Scan& scan, const CellSizes& sizes, const Optional& operand_mask, const std::vector<double>& zoneout,
               const Optional& kept) {
  STD_TORCH_CHECK(zoneout.empty() || zoneout.size() == size_t(sizes.states), "expected zoneout of ", sizes.states,
                  " states or none, got ", zoneout.size());
  scan.operand_mask = data(operand_mask);
  scan.noisy = scan.operand_mask != nullptr;
  const bool* of_state = static_cast<const bool*>(data(kept));
  for (size_t k = 0; k < zoneout.size(); ++k) {
    State& state = scan.states[k];
    state.zoneout = zoneout[k];
    state.zones = zoneout[k] > 0;
    if (!state.zones) continue;
    scan.noisy = true;
    state.kept = of_state;
    if (of_state) of_state += scan.rows * scan.directions * scan.hidden;
  }
}

// Sets the weights of layer normalization, [D, ...] each.
void set_norms(Scan& scan, const Optional& norm_hh, const Optional& norm_source, const Optional& norm_source_bias) {
  const auto of_direction = [](const Optional& tensor, int d) {
    return tensor ? moved(data(tensor), d * tensor->stride(0) * int64_t(tensor->element_size())) : nullptr;
  };
  for (int d = 0; norm_hh && d < norm_hh->size(0); ++d)
    scan.norms[d] = {of_direction(norm_hh, d), of_direction(norm_source, d), of_direction(norm_source_bias, d)};
}

// Sets what both kinds of scan read and write in the forward pass.
void set_forward(Scan& scan, const CellSizes& sizes, const Tensor& gates, const Optionals& b_ih, const Optionals& b_hh,
                 const Tensors& initial, const Optional& reset, const Tensors& reset_states, int64_t keep,
                 const Optionals& outputs, const Tensors& finals, const Tensor& reserve) {
  for (size_t d = 0; d < b_ih.size(); ++d) {
    scan.b_ih[d] = data(b_ih[d]);
    scan.b_hh[d] = data(b_hh[d]);
  }
  scan.gates = data(gates);
  set_before(scan, sizes, initial, reset, reset_states);
  set_states(scan, sizes, "outputs", outputs, &State::all);
  set_states(scan, sizes, "finals", finals, &State::final);
  scan.keep = static_cast<Keep>(keep);
  scan.reserve = mutable_data(reserve);
}

// Sets what both kinds of scan read and write in the backward pass.
void set_backward(Scan& scan, const CellSizes& sizes, const Tensors& initial, const Optional& reset,
                  const Tensors& reset_states, const Tensor& output, const Tensor& reserve,
                  const Optionals& grad_outputs, const Optionals& grad_finals, double grad_clip, int64_t grad_cut,
                  const Tensor& grad_gates, const Optionals& grad_initial, const Tensors& grad_resets,
                  const Optionals& flow) {
  set_before(scan, sizes, initial, reset, reset_states);
  scan.states[0].all = const_cast<void*>(data(output));
  scan.keep = Keep::everything;
  scan.reserve = const_cast<void*>(data(reserve));
  set_states(scan, sizes, "grad_outputs", grad_outputs, &State::grad_all);
  set_states(scan, sizes, "grad_finals", grad_finals, &State::grad_final);
  scan.rule = {grad_clip, grad_cut};
  scan.grad_gates = mutable_data(grad_gates);
  set_states(scan, sizes, "grad_initial", grad_initial, &State::grad_initial);
  set_states(scan, sizes, "grad_resets", grad_resets, &State::grad_reset);
  set_states(scan, sizes, "flow", flow, &State::flow);
}

// How a persistent scan is split into blocks, as rnnkit/plan.py says.
struct Plan {
  int64_t units, tiles;  // of a block: hidden units; it multiplies 8 * tiles rows of the batch at a time
  int64_t batch_tile;    // rows of the batch that it owns
  int64_t shared_bytes;  // and its shared memory, as the plan has counted it
  bool cluster;          // the blocks of a direction and slice are a cluster
};

PersistentScan persistent_scan(const Plan& plan, int64_t element_bytes, const Tensors& weights, const Optional& offsets,
                               int64_t steps, int64_t batch, int64_t hidden, int64_t rows, const Tensor& workspace,
                               bool precise, int exchange_gates) {
  PersistentScan scan{};
  scan.steps = steps;
  scan.batch = batch;
  scan.hidden = hidden;
  scan.directions = static_cast<int64_t>(weights.size());
  scan.rows = rows;
  scan.offsets = static_cast<const int64_t*>(data(offsets));
  scan.units = static_cast<int>(plan.units);
  scan.batch_tile = static_cast<int>(plan.batch_tile);
  STD_TORCH_CHECK(plan.units > 0 && plan.tiles > 0 && plan.batch_tile > 0 && plan.batch_tile % (8 * plan.tiles) == 0,
                  "unexpected plan");
  scan.blocks = static_cast<int>((hidden + scan.units - 1) / scan.units);
  scan.slices = static_cast<int>((batch + scan.batch_tile - 1) / scan.batch_tile);
  for (size_t d = 0; d < weights.size(); ++d) scan.weight[d] = data(weights[d]);
  const int64_t teams = scan.directions * scan.slices;  // of blocks that exchange with each other
  scan.precise = precise;
  if (plan.cluster) return scan;
  const int64_t flags = teams * scan.blocks * kFlagStride * int64_t(sizeof(uint32_t));
  const int64_t exchanged =
      teams * 2 * exchange_bytes_of<int64_t>(slabs_of(hidden, element_bytes, exchange_gates), scan.slice_tiles());
  STD_TORCH_CHECK(workspace.numel() >= flags + exchanged, "expected a workspace of ", flags + exchanged, " bytes, got ",
                  workspace.numel());
  scan.exchanged = mutable_data(workspace);
  scan.flags = reinterpret_cast<uint32_t*>(static_cast<std::byte*>(scan.exchanged) + exchanged);
  return scan;
}

void launch(const std::string& cell, Type type, bool backward, const Plan& plan, const PersistentScan& scan,
            const Tensor& on) {
  const Persistent* kernel =
      find_persistent(cell, type, backward, plan.cluster, static_cast<int>(plan.units), static_cast<int>(plan.tiles));
  STD_TORCH_CHECK(kernel != nullptr, "no persistent kernel for ", cell, " with ", plan.units, " units and ", plan.tiles,
                  " tiles");
  const int64_t shared_bytes = kernel->shared_bytes(scan);
  STD_TORCH_CHECK(plan.shared_bytes == shared_bytes, "expected a plan with ", shared_bytes,
                  " bytes of shared memory, got ", plan.shared_bytes);
  const Guard guard(on);
  check(launch_persistent(*kernel, scan, stream_of(on)));
}

void persistent_forward(std::string cell, int64_t units, int64_t tiles, int64_t batch_tile, int64_t shared_bytes,
                        bool cluster, Tensor gates, Tensors w_hh, Optionals b_ih, Optionals b_hh, Tensors initial,
                        Optional reset, Tensors reset_states, Optional operand_mask, std::vector<double> zoneout,
                        Optional kept, Optional offsets, int64_t steps, int64_t batch, int64_t keep, bool precise,
                        Tensor workspace, Optionals outputs, Tensors finals, Tensor reserve) {
  const Type type = type_of(gates);
  const Plan plan{units, tiles, batch_tile, shared_bytes, cluster};
  PersistentScan scan = persistent_scan(plan, gates.element_size(), w_hh, offsets, steps, batch, w_hh[0].size(1),
                                        gates.size(0), workspace, precise, 1);
  set_forward(scan, sizes_of(cell), gates, b_ih, b_hh, initial, reset, reset_states, keep, outputs, finals, reserve);
  set_noise(scan, sizes_of(cell), operand_mask, zoneout, kept);
  launch(cell, type, false, plan, scan, gates);
}

// weights: w_hh of each direction, transposed.
void persistent_backward(std::string cell, int64_t units, int64_t tiles, int64_t batch_tile, int64_t shared_bytes,
                         bool cluster, Tensors weights, Tensors initial, Optional reset, Tensors reset_states,
                         Optional operand_mask, std::vector<double> zoneout, Optional kept, Optional offsets,
                         int64_t steps, int64_t batch, Tensor output, Tensor reserve, Optionals grad_outputs,
                         Optionals grad_finals, double grad_clip, int64_t grad_cut, bool precise, Tensor workspace,
                         Tensor grad_gates, Optionals grad_initial, Tensors grad_resets, Optionals flow) {
  const Type type = type_of(output);
  const Plan plan{units, tiles, batch_tile, shared_bytes, cluster};
  const CellSizes sizes = sizes_of(cell);
  PersistentScan scan = persistent_scan(plan, output.element_size(), weights, offsets, steps, batch, weights[0].size(0),
                                        output.size(0), workspace, precise, sizes.gates);
  set_backward(scan, sizes, initial, reset, reset_states, output, reserve, grad_outputs, grad_finals, grad_clip,
               grad_cut, grad_gates, grad_initial, grad_resets, flow);
  set_noise(scan, sizes, operand_mask, zoneout, kept);
  launch(cell, type, true, plan, scan, output);
}

StepwiseScan stepwise_scan(const Tensor& w_hh, const Optional& w_hr, std::vector<int64_t> counts, int64_t rows,
                           bool precise, const Optional& between, const Tensor& recurrent,
                           const Optional& unprojected) {
  StepwiseScan scan{};
  scan.steps = static_cast<int64_t>(counts.size());
  scan.batch = counts[0];
  scan.projected = w_hh.size(2);
  scan.hidden = w_hr ? w_hr->size(2) : scan.projected;
  scan.directions = w_hh.size(0);
  scan.rows = rows;
  scan.precise = precise;
  scan.weight[0] = data(w_hh);
  scan.counts = std::move(counts);
  scan.w_hr = data(w_hr);
  scan.between = mutable_data(between);
  scan.recurrent = mutable_data(recurrent);
  scan.unprojected = mutable_data(unprojected);
  return scan;
}

void stepwise_forward(std::string cell, Tensor gates, Tensor w_hh, Optionals b_ih, Optionals b_hh, Optional w_hr,
                      Optional norm_hh, Optional norm_source, Optional norm_source_bias, Tensors initial,
                      Optional reset, Tensors reset_states, Optional operand_mask, std::vector<double> zoneout,
                      Optional kept, std::vector<int64_t> counts, int64_t keep, bool precise, Optional between,
                      Tensor recurrent, Optional masked, Optional unprojected, Optionals outputs, Tensors finals,
                      Tensor reserve) {
  const Type type = type_of(gates);
  STD_TORCH_CHECK(counts.size() == 1 || between, "expected between for more than one step, got none");
  const bool asked = !outputs.empty() && outputs[0];
  STD_TORCH_CHECK(asked == !finals.empty() && (asked || counts.size() == 1),
                  "expected an output and finals, or neither of a single step");
  STD_TORCH_CHECK(bool(operand_mask) == bool(masked), "expected operand_mask and masked, or neither");
  StepwiseScan scan =
      stepwise_scan(w_hh, w_hr, std::move(counts), gates.size(0), precise, between, recurrent, unprojected);
  set_forward(scan, sizes_of(cell), gates, b_ih, b_hh, initial, reset, reset_states, keep, outputs, finals, reserve);
  set_norms(scan, norm_hh, norm_source, norm_source_bias);
  set_noise(scan, sizes_of(cell), operand_mask, zoneout, kept);
  scan.masked = mutable_data(masked);
  for (size_t k = 0; k < initial.size(); ++k) scan.states[k].initial_is_wide = type_of(initial[k]) != type;
  scan.gate_stride = gates.stride(0);
  const Guard guard(gates);
  run_stepwise(cell, type, false, scan, stream_of(gates), blas_handle());
}

void stepwise_backward(std::string cell, Tensor w_hh, Optional w_hr, Optional norm_hh, Optional norm_source,
                       Optional norm_source_bias, Tensors initial, Optional reset, Tensors reset_states,
                       Optional operand_mask, std::vector<double> zoneout, Optional kept, std::vector<int64_t> counts,
                       bool precise, Tensor output, Tensor reserve, Optionals grad_outputs, Optionals grad_finals,
                       double grad_clip, int64_t grad_cut, Tensor between, Tensor grad_recurrent,
                       Optional grad_unprojected, Optional grad_projected, Tensor grad_gates, Optionals grad_initial,
                       Tensors grad_resets, Optionals flow) {
  StepwiseScan scan =
      stepwise_scan(w_hh, w_hr, std::move(counts), output.size(0), precise, between, grad_recurrent, grad_unprojected);
  set_backward(scan, sizes_of(cell), initial, reset, reset_states, output, reserve, grad_outputs, grad_finals,
               grad_clip, grad_cut, grad_gates, grad_initial, grad_resets, flow);
  set_norms(scan, norm_hh, norm_source, norm_source_bias);
  set_noise(scan, sizes_of(cell), operand_mask, zoneout, kept);
  scan.grad_projected = mutable_data(grad_projected);
  const Guard guard(output);
  run_stepwise(cell, type_of(output), true, scan, stream_of(output), blas_handle());
}

// h [D, rows, H] before its projection, from a reserve [D, rows, V, H].
void unprojected(std::string cell, Optional norm_hh, Optional norm_source, Optional norm_source_bias, Tensor reserve,
                 Tensor h) {
  Scan scan{};
  set_norms(scan, norm_hh, norm_source, norm_source_bias);
  Steps steps{};
  steps.directions = static_cast<int>(h.size(0));
  for (int d = 0; d < steps.directions; ++d) {
    Step& step = steps.of[d];
    step.rows = h.size(1);
    step.hidden = h.size(2);
    step.values = static_cast<int>(reserve.size(2));
    step.norms = scan.norms[d];
    step.reserve = moved(data(reserve), d * reserve.stride(0) * int64_t(reserve.element_size()));
    step.h = moved(mutable_data(h), d * h.stride(0) * int64_t(h.element_size()));
  }
  const Guard guard(h);
  check(launch_unprojected(cell, type_of(h), steps, stream_of(h)));
}

}  // namespace
}  // namespace rnnkit::cuda

// In lists over the cell's states the first is h; outputs: the values of each at all steps, [rows, D*H].
STABLE_TORCH_LIBRARY_FRAGMENT(rnnkit, m) {
  m.def(
      "persistent_forward(str cell, int units, int tiles, int batch_tile, int shared_bytes, bool cluster, Tensor "
      "gates, "
      "Tensor[] w_hh,"
      " Tensor?[] b_ih, Tensor?[] b_hh, Tensor[] initial, Tensor? reset, Tensor[] reset_states,"
      " Tensor? operand_mask, float[] zoneout, Tensor? kept, Tensor? offsets,"
      " int steps, int batch, int keep, bool precise,"
      " Tensor(a!) workspace, Tensor(b!)?[] outputs, Tensor(c!)[] finals, Tensor(d!) reserve) -> ()");
  m.def(
      "persistent_backward(str cell, int units, int tiles, int batch_tile, int shared_bytes, bool cluster, Tensor[] "
      "weights,"
      " Tensor[] initial, Tensor? reset, Tensor[] reset_states, Tensor? operand_mask, float[] zoneout, Tensor? kept,"
      " Tensor? offsets, int steps, int batch, Tensor output, Tensor reserve,"
      " Tensor?[] grad_outputs, Tensor?[] grad_finals, float grad_clip, int grad_cut, bool precise, Tensor(a!) "
      "workspace, Tensor(b!) grad_gates,"
      " Tensor(c!)?[] grad_initial, Tensor(d!)[] grad_resets, Tensor(e!)?[] flow) -> ()");
  m.def(
      "stepwise_forward(str cell, Tensor gates, Tensor w_hh, Tensor?[] b_ih, Tensor?[] b_hh, Tensor? w_hr,"
      " Tensor? norm_hh, Tensor? norm_source, Tensor? norm_source_bias,"
      " Tensor[] initial, Tensor? reset, Tensor[] reset_states, Tensor? operand_mask, float[] zoneout, Tensor? kept,"
      " int[] counts, int keep, bool precise, Tensor(a!)? between, Tensor(b!) recurrent, Tensor(c!)? masked,"
      " Tensor(d!)? unprojected, Tensor(e!)?[] outputs, Tensor(f!)[] finals, Tensor(g!) reserve) -> ()");
  m.def(
      "stepwise_backward(str cell, Tensor w_hh, Tensor? w_hr, Tensor? norm_hh, Tensor? norm_source,"
      " Tensor? norm_source_bias, Tensor[] initial, Tensor? reset, Tensor[] reset_states,"
      " Tensor? operand_mask, float[] zoneout, Tensor? kept, int[] counts, bool precise,"
      " Tensor output, Tensor reserve, Tensor?[] grad_outputs, Tensor?[] grad_finals, float grad_clip, int grad_cut, "
      "Tensor(a!) between,"
      " Tensor(b!) grad_recurrent, Tensor(c!)? grad_unprojected, Tensor(d!)? grad_projected, Tensor(e!) grad_gates,"
      " Tensor(f!)?[] grad_initial, Tensor(g!)[] grad_resets, Tensor(h!)?[] flow) -> ()");
  m.def(
      "unprojected(str cell, Tensor? norm_hh, Tensor? norm_source, Tensor? norm_source_bias, Tensor reserve,"
      " Tensor(a!) h) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rnnkit, RNNKIT_KEY, m) {
  m.impl("persistent_forward", TORCH_BOX(&rnnkit::cuda::persistent_forward));
  m.impl("persistent_backward", TORCH_BOX(&rnnkit::cuda::persistent_backward));
  m.impl("stepwise_forward", TORCH_BOX(&rnnkit::cuda::stepwise_forward));
  m.impl("stepwise_backward", TORCH_BOX(&rnnkit::cuda::stepwise_backward));
  m.impl("unprojected", TORCH_BOX(&rnnkit::cuda::unprojected));
}
