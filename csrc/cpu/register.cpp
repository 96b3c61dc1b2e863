// Registers the CPU kernels of the ops in rnnkit/ops.py, when the module `rnnkit._C` is loaded.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <sys/syscall.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/caches.h"
#include "cpu/call.h"
#include "cpu/direct.h"
#include "cpu/interpreter.h"
#include "cpu/layer.h"
#include "cpu/memory.h"
#include "cpu/peak.h"

namespace rnnkit {
namespace {

using at::Tensor;

// Whether a signal handler that wants_to_stop called has raised. The exception is this thread's Python error indicator.
thread_local bool interrupted = false;

// Runs Python's signal handlers if this is the main thread, the only one in which Python runs them. Returns whether one
// has raised.
bool wants_to_stop() {
  if (interrupted || syscall(SYS_gettid) != getpid()) return interrupted;
  const py::gil_scoped_acquire acquired;
  interrupted = PyErr_CheckSignals() != 0;
  return interrupted;
}

// torch's ScalarType for an element type of the kernels.
template <class S>
constexpr at::ScalarType kScalarType = c10::CppTypeToScalarType<S>::value;
template <>
constexpr at::ScalarType kScalarType<BFloat16> = at::kBFloat16;
template <>
constexpr at::ScalarType kScalarType<bool> = at::kBool;

template <class S>
S* data(const Tensor& tensor) {
  return static_cast<S*>(tensor.mutable_data_ptr());
}

// Makes tensors contiguous and converts them to the kernels' types, and keeps the copies that a Layer points into.
class Operands {
 public:
  template <class S>
  const S* read(const std::optional<Tensor>& tensor) {
    if (!tensor || !tensor->defined()) return nullptr;
    if (tensor->scalar_type() == kScalarType<S> && tensor->is_contiguous() && !tensor->is_neg())
      return static_cast<const S*>(tensor->const_data_ptr());  // no copy: the caller keeps it alive
    kept_.push_back(tensor->to(kScalarType<S>).resolve_neg().contiguous());
    return static_cast<const S*>(kept_.back().const_data_ptr());
  }

 private:
  std::vector<Tensor> kept_;
};

template <class S>
Layer<S> make_layer(const Call& call, Operands& operands) {
  using T = Sum<S>;
  Layer<S> layer{};
  layer.steps = call.steps;
  layer.batch = call.batch;
  layer.input = call.input_size;
  layer.hidden = call.hidden;
  layer.projected = call.projected;
  layer.directions = call.directions;
  layer.heads = call.heads;
  layer.multiplies_input = call.multiplies_input();
  layer.direction = PerDirection<Direction<S>>(call.directions);
  layer.offsets = call.offsets.empty() ? nullptr : call.offsets.data();
  for (int64_t d = 0; d < call.directions; ++d) {
    Direction<S>& direction = layer.direction[d];
    direction.w_ih = operands.read<S>(call.weight(d, 0));
    direction.w_hh = operands.read<S>(call.weight(d, 1));
    direction.b_ih = operands.read<T>(call.weight(d, 2));
    direction.b_hh = operands.read<T>(call.weight(d, 3));
    direction.w_hr = operands.read<S>(call.weight(d, 4));
    if (call.cell.parameters > 0) direction.unit = operands.read<T>(call.weight(d, kWeights));
    if (!call.normalizes()) continue;
    Norms<T>& norms = direction.norms;
    const T** const places[] = {&norms.ih, &norms.hh, &norms.c, &norms.c_bias};
    for (int64_t k = 0; k < kNorms; ++k) *places[k] = operands.read<T>(call.weight(d, kWeights + k));
  }
  layer.x = operands.read<S>(call.input);
  for (int64_t i = 0; i < int64_t(call.states.size()); ++i) {
    State<T>& state = layer.states[i % call.cell.states];
    (i < call.cell.states ? state.initial : state.reset) = operands.read<T>(call.states[i]);
  }
  layer.grad_clip = call.rule.clip > 0 ? static_cast<T>(call.rule.clip) : std::numeric_limits<T>::infinity();
  layer.grad_cut = call.rule.cut;
  layer.reset = operands.read<bool>(call.masks.reset);
  layer.operand_mask = operands.read<T>(call.masks.operand);
  for (size_t i = 0; i < call.masks.zoneout.size(); ++i) {
    layer.states[i].zoneout = static_cast<T>(call.masks.zoneout[i]);
    layer.states[i].kept = operands.read<bool>(call.kept(i));
  }
  layer.threads = call.threads();
  layer.wants_to_stop = wants_to_stop;
  layer.cell = call.cell.registered;
  return layer;
}

// Runs the kernel. Throws the exception, such as KeyboardInterrupt, that a signal handler raised meanwhile.
template <class S>
void run(int64_t (*scratch)(const Layer<S>&), void (*kernel)(const Layer<S>&, std::byte*), const Layer<S>& layer) {
  interrupted = false;
  kernel(layer, Scratch(scratch(layer)).begin());
  if (!interrupted) return;
  const py::gil_scoped_acquire acquired;
  throw_python_error();
}

// Calls body with a value of the call's operand type, unless the call is empty.
template <class Body>
void with_operand_type(const Call& call, const Body& body) {
  if (call.empty()) return;
  switch (call.operand_type()) {
    case at::kDouble:
      return body(double());
    case at::kBFloat16:
      return body(BFloat16());
    default:
      return body(float());
  }
}

}  // namespace

void register_graph(std::string_view name) {
  if (!Py_IsInitialized()) return;
  const py::gil_scoped_acquire acquired;
  try {
    py::module_::import("rnnkit.graph.kernels").attr("register")(py::str(name.data(), name.size()));
  } catch (py::error_already_set& error) {
    error.restore();
    throw_python_error();
  }
}

int64_t gates_of(std::string_view cell) { return find_cell(cell).gates; }
int64_t states_of(std::string_view cell) { return find_cell(cell).states; }

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> layer_forward(
    std::string_view cell, const Tensor& input, at::TensorList states, const OptionalTensors& weights,
    const std::optional<Tensor>& batch_sizes, bool all_states, double grad_clip, int64_t grad_cut,
    const std::optional<Tensor>& reset, const std::optional<Tensor>& operand_mask,
    std::optional<at::ArrayRef<double>> zoneout, const std::optional<Tensor>& kept, int64_t heads,
    const std::optional<Tensor>& packed, int64_t keeps) {
  TORCH_CHECK(keeps >= 0 && keeps <= 2, "expected keep to be 0, 1 or 2, got ", keeps);
  const Keep keep = static_cast<Keep>(keeps);
  const Call call(cell, input, states, weights, batch_sizes, all_states, {grad_clip, grad_cut},
                  {reset, operand_mask, zoneout ? zoneout->vec() : std::vector<double>(), kept}, heads);
  const auto result = [&](const std::vector<int64_t>& shape, const at::TensorOptions& options) {
    return call.empty() ? at::zeros(shape, options) : allocate(shape, options);
  };
  // h is written in the operand type, because the next step multiplies it.
  std::vector<Tensor> outputs = {result(call.output_shape(0), call.operand_options())}, finals;
  for (int64_t i = 1; i < call.outputs(); ++i) outputs.push_back(result(call.output_shape(i), call.compute_options()));
  for (int64_t i = 0; i < call.cell.states; ++i) finals.push_back(result(call.state_shape(i), call.compute_options()));
  const Tensor reserve = allocate(call.reserve_shape(keep), call.compute_options());
  with_operand_type(call, [&](auto operand) {
    using S = decltype(operand);
    using T = Sum<S>;
    Operands operands;
    Layer<S> layer = make_layer<S>(call, operands);
    layer.y = data<S>(outputs[0]);
    for (int64_t i = 1; i < call.outputs(); ++i) layer.states[i].all = data<T>(outputs[i]);
    for (size_t i = 0; i < finals.size(); ++i) layer.states[i].final = data<T>(finals[i]);
    layer.keep = keep;
    layer.reserve = data<T>(reserve);
    const Kernels<S>& kernels = kernels_of<S>(call.cell);
    if (packed) {
      const int64_t size = kernels.packed_size(layer);
      TORCH_CHECK(has_memory(*packed), "expected packed to have ", size, " bytes of memory, got ",
                  packed->storage().nbytes(), ": its storage was resized");
      TORCH_CHECK(packed->scalar_type() == at::kByte && packed->is_contiguous() && packed->numel() == size &&
                      reinterpret_cast<uintptr_t>(packed->const_data_ptr()) % 64 == 0 &&
                      kernels.check(layer, static_cast<const std::byte*>(packed->const_data_ptr())),
                  "expected packed to be ", size,
                  " bytes from pack_weights for this cell, these sizes and this CPU, got ", packed->scalar_type(),
                  " of shape ", packed->sizes());
      layer.packed = static_cast<const std::byte*>(packed->const_data_ptr());
    }
    run(kernels.forward_scratch, kernels.forward, layer);
  });
  for (std::vector<Tensor>* results : {&outputs, &finals})
    for (Tensor& tensor : *results) tensor = tensor.to(call.input.scalar_type());
  return {std::move(outputs), std::move(finals), reserve};
}

namespace {

Tensor pack_weights(std::string_view cell, const OptionalTensors& weights, int64_t heads) {
  Tensor input = at::empty({1, 1, 0}, at::kFloat);
  const std::optional<Tensor> w_ih = weights.empty() ? std::nullopt : weights.get(0);
  TORCH_CHECK(weights.empty() || w_ih, "expected w_ih of direction 0 to be a tensor, got None");
  if (w_ih && w_ih->dim() == 2)  // any other w_ih is refused, whatever the input
    input = at::empty({1, 1, w_ih->size(1)}, w_ih->options());
  const Call call(cell, input, {}, weights, std::nullopt, /*all_states=*/false, {}, {}, heads);
  Tensor packed = at::empty({0}, at::kByte);
  with_operand_type(call, [&](auto operand) {
    using S = decltype(operand);
    Operands operands;
    const Layer<S> layer = make_layer<S>(call, operands);
    const Kernels<S>& kernels = kernels_of<S>(call.cell);
    packed = allocate({kernels.packed_size(layer)}, at::kByte);
    kernels.pack(layer, data<std::byte>(packed));
  });
  return packed;
}

}  // namespace

std::vector<Tensor> layer_backward(std::string_view cell, const Tensor& input, at::TensorList states,
                                   const OptionalTensors& weights, const std::optional<Tensor>& batch_sizes,
                                   bool all_states, double grad_clip, int64_t grad_cut,
                                   const std::optional<Tensor>& reset, const std::optional<Tensor>& operand_mask,
                                   std::optional<at::ArrayRef<double>> zoneout, const std::optional<Tensor>& kept,
                                   int64_t heads, const OptionalTensors& grads, const Tensor& output,
                                   const Tensor& reserve, int64_t keep, const c10::List<bool>& needs, bool flow) {
  const Call call(cell, input, states, weights, batch_sizes, all_states, {grad_clip, grad_cut},
                  {reset, operand_mask, zoneout ? zoneout->vec() : std::vector<double>(), kept}, heads);
  call.check_backward(grads, output, reserve, keep, needs, flow);
  std::vector<Tensor> wanted = {input};
  wanted.insert(wanted.end(), call.states.begin(), call.states.end());
  for (size_t i = 0; i < weights.size(); ++i) wanted.push_back(weights.get(i).value_or(Tensor()));
  std::vector<Tensor> results(wanted.size());
  for (size_t i = 0; i < wanted.size(); ++i)
    if (needs.get(i) && wanted[i].defined())
      results[i] = call.empty() ? at::zeros(wanted[i].sizes(), call.compute_options())
                                : allocate(wanted[i].sizes(), call.compute_options());
  std::vector<Tensor> flows;
  for (int64_t i = 0; flow && i < call.cell.states; ++i)
    flows.push_back(call.empty() ? at::zeros(call.output_shape(i), call.compute_options())
                                 : allocate(call.output_shape(i), call.compute_options()));
  with_operand_type(call, [&](auto operand) {
    using S = decltype(operand);
    using T = Sum<S>;
    Operands operands;
    Layer<S> layer = make_layer<S>(call, operands);
    for (size_t i = 0; i < flows.size(); ++i) layer.states[i].flow = data<T>(flows[i]);
    layer.y = const_cast<S*>(operands.read<S>(output));  // the backward pass only reads it
    layer.keep = static_cast<Keep>(keep);
    layer.reserve = const_cast<T*>(operands.read<T>(reserve));
    for (int64_t i = 0; i < call.outputs(); ++i) layer.states[i].grad_all = operands.read<T>(grads.get(i));
    for (int64_t i = 0; i < call.cell.states; ++i)
      layer.states[i].grad_final = operands.read<T>(grads.get(call.outputs() + i));
    const auto write = [&](size_t i) { return results[i].defined() ? data<T>(results[i]) : nullptr; };
    layer.grad_x = write(0);
    for (int64_t i = 0; i < int64_t(call.states.size()); ++i) {
      State<T>& state = layer.states[i % call.cell.states];
      (i < call.cell.states ? state.grad_initial : state.grad_reset) = write(1 + i);
    }
    for (int64_t d = 0; d < call.directions; ++d) {
      const size_t first = 1 + call.states.size() + d * call.kinds;
      Direction<S>& direction = layer.direction[d];
      Norms<T>& norms = direction.norms;
      T** const places[] = {&direction.grad_w_ih, &direction.grad_w_hh, &direction.grad_b_ih,
                            &direction.grad_b_hh, &direction.grad_w_hr, &norms.grad_ih,
                            &norms.grad_hh,       &norms.grad_c,        &norms.grad_c_bias};
      const int64_t kinds = call.kinds - (call.cell.parameters > 0 ? 1 : 0);
      for (int64_t k = 0; k < kinds; ++k) *places[k] = write(first + k);
      if (call.cell.parameters > 0) direction.grad_unit = write(first + kWeights);
    }
    const Kernels<S>& kernels = kernels_of<S>(call.cell);
    run(kernels.backward_scratch, kernels.backward, layer);
  });
  std::vector<Tensor> needed;
  for (const Tensor& result : results)
    if (result.defined()) needed.push_back(result.to(input.scalar_type()));
  needed.insert(needed.end(), flows.begin(), flows.end());
  return needed;
}

namespace {

using CellFacts = std::tuple<std::string, int64_t, int64_t, int64_t, std::vector<int64_t>, bool, bool>;

std::vector<CellFacts> list_cells() {
  std::vector<CellFacts> list;
  for (const CellKernels* cell = isa().cells.begin; cell != isa().cells.end; ++cell)
    list.emplace_back(cell->name, cell->gates, cell->states, cell->saved,
                      std::vector<int64_t>(cell->input_grad, cell->input_grad + cell->gates), cell->projects,
                      cell->has_source);
  return list;
}

// The functions of a registered cell at these addresses, in the order of Pointwise; 0: not there.
template <class T>
Pointwise<T> pointwise_at(const std::array<uintptr_t, kFunctions>& addresses) {
  using Forward = decltype(Pointwise<T>::forward);
  using Backward = decltype(Pointwise<T>::backward);
  return {.forward = reinterpret_cast<Forward>(addresses[0]),
          .backward = reinterpret_cast<Backward>(addresses[1]),
          .grad_states = reinterpret_cast<Backward>(addresses[2]),
          .output = reinterpret_cast<Backward>(addresses[3]),
          .operand = reinterpret_cast<Forward>(addresses[4]),
          .late_grads = reinterpret_cast<Backward>(addresses[5])};
}

void register_cell_at(const std::string& name, int64_t gates, int64_t recurrent, int64_t states, int64_t saved,
                      int64_t parameters, const std::vector<int64_t>& input_grads, bool uses_h, bool uses_previous_h,
                      bool projects, const std::array<uintptr_t, kFunctions>& f32,
                      const std::array<uintptr_t, kFunctions>& f64, uintptr_t context, int64_t late) {
  RegisteredCell cell{};
  cell.gates = gates;
  cell.recurrent = recurrent;
  cell.late = late;
  cell.states = states;
  cell.saved = saved;
  cell.parameters = parameters;
  TORCH_CHECK(int64_t(input_grads.size()) == gates && gates <= kMaxGates, "expected input_grads of ", gates,
              " gates, at most ", kMaxGates, ", got ", input_grads.size());
  std::copy(input_grads.begin(), input_grads.end(), cell.input_grad);
  cell.grads = recurrent;
  for (const int64_t column : input_grads) cell.grads = std::max(cell.grads, column + 1);
  cell.uses_h = uses_h;
  cell.uses_previous_h = uses_previous_h;
  cell.f32 = pointwise_at<float>(f32);
  cell.f64 = pointwise_at<double>(f64);
  cell.context = reinterpret_cast<const void*>(context);
  register_cell(name, cell, projects);
}

template <class T>
std::array<uintptr_t, kFunctions> addresses(const Pointwise<T>& functions) {
  return {reinterpret_cast<uintptr_t>(functions.forward),     reinterpret_cast<uintptr_t>(functions.backward),
          reinterpret_cast<uintptr_t>(functions.grad_states), reinterpret_cast<uintptr_t>(functions.output),
          reinterpret_cast<uintptr_t>(functions.operand),     reinterpret_cast<uintptr_t>(functions.late_grads)};
}

py::dict interpret(const std::array<WrittenProgram, kFunctions>& programs) {
  py::dict functions;
  functions["f32"] = addresses(isa().interpreter.f32);
  functions["f64"] = addresses(isa().interpreter.f64);
  functions["context"] = reinterpret_cast<uintptr_t>(make_programs(programs));
  return functions;
}

}  // namespace

TORCH_LIBRARY_IMPL(rnnkit, CPU, m) {
  m.impl("layer_forward", layer_forward);
  m.impl("layer_backward", layer_backward);
  m.impl("pack_weights", pack_weights);
}

// The module works without the GIL: all state that calls share is atomic, thread-local or initialized once.
#if PYBIND11_VERSION_HEX >= 0x020D0000
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m, py::mod_gil_not_used()) {
#else
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
#endif
  m.doc() = "rnnkit's CPU kernels; importing it registers them with torch.";
  m.def("capability", [] { return isa().name; }, "The instruction set of the kernels in use.");
  m.def("multiplies_bfloat16", multiplies_bfloat16, "Whether bfloat16 is multiplied directly, and not as float.");
  m.def("direct_layers", direct_layers, "The fast path of layers; None if the call is not an ordinary one.");
  m.def("record_flow", record_flow, "Whether backward passes hand the gradients of states to a recorder.");
  m.def("direct_cell", direct_cell, "The fast path of a cell's step; None if the call is not an ordinary one.");
  m.def("peak_gflops", peak_gflops, py::arg("dtype"), py::arg("threads"), py::arg("seconds"),
        py::call_guard<py::gil_scoped_release>(),
        "GFLOP/s that these threads reach together if they only multiply and add in registers.");
  m.def("read_bandwidth", read_bandwidth, py::arg("bytes"), py::arg("threads"), py::arg("seconds"),
        py::call_guard<py::gil_scoped_release>(),
        "Bytes a second that these threads read together, each from a buffer of its own of this many bytes.");
  m.def(
      "cache_sizes", [] { return std::make_tuple(cache_sizes().l1, cache_sizes().l2, cache_sizes().l3); },
      "Bytes of L1 (for data), L2 and L3; 0 if the size of L3 is unknown.");
  m.def(
      "register_cell", register_cell_at, py::arg("name"), py::kw_only(), py::arg("gates"), py::arg("recurrent"),
      py::arg("states"), py::arg("saved"), py::arg("parameters"), py::arg("input_grads"), py::arg("uses_h"),
      py::arg("uses_previous_h"), py::arg("projects"), py::arg("f32"), py::arg("f64"), py::arg("context") = 0,
      py::arg("late") = 0,
      "Makes the ops find a cell, for good. f32, f64: the addresses of the functions in csrc/cpu/pointwise.h, in their "
      "order, 0 for those that the cell does not need; the other arguments as in rnnkit.specs.CellSpec.");
  m.def("interpret", interpret,
        "The arguments f32, f64 and context of register_cell for a cell whose functions are programs "
        "(csrc/cpu/interpreter.h), in the same order.");
  m.def("cells", list_cells,
        "(name, gates, states, saved, input_grads, projects, has_source) of each cell, as in rnnkit.specs.CELLS.");
}

}  // namespace rnnkit
