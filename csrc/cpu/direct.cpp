// The fast path of a call: from a module's arguments to the op and back in one call from Python. A small layer is
// computed in less time than Python takes to check its arguments. The fast path serves ordinary calls: dense CPU
// tensors that fit the layer, without autocast, transforms, modes or subclasses. For any other call it returns None,
// and the Python code runs, which also raises the errors.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "cpu/direct.h"

namespace at::autocast {
bool is_autocast_enabled(DeviceType);  // declared here: its header includes all operators, twice the compiler's memory
}

namespace rnnkit {
namespace {

using at::Tensor;
using torch::autograd::variable_list;
using Weights = std::vector<std::optional<Tensor>>;  // kWeights for each layer and direction

constexpr auto kOrdinaryKeys = c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                                    c10::DispatchKey::AutocastCPU, c10::DispatchKey::ADInplaceOrView});

// Whether the tensor is a dense CPU tensor without a forward-mode tangent, subclass or transform.
bool is_ordinary(const Tensor& tensor) {
  if ((tensor.key_set().raw_repr() & ~kOrdinaryKeys.raw_repr()) != 0) return false;
  return !tensor.unsafeGetTensorImpl()->has_storage() || !tensor._fw_grad(0).defined();
}

// Whether this thread has no autocast, transform or mode that would have to see the call.
bool ordinary_dispatch() {
  constexpr auto ordinary = c10::DispatchKeySet({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
  const bool others = (c10::impl::tls_local_dispatch_key_set().included_.raw_repr() & ~ordinary.raw_repr()) != 0;
  return !others && !at::autocast::is_autocast_enabled(at::kCPU) && !at::impl::torch_function_mode_enabled();
}

// Reads tensors from Python. `fits` becomes false at the first one that is not ordinary, or whose dtype differs from
// the first one's.
class Arguments {
 public:
  bool fits = true;
  bool need_gradients = false;

  Tensor tensor(PyObject* object) {
    const PyTypeObject* type = Py_TYPE(object);
    if (!fits || (type != tensor_type() && type != parameter_type())) return refuse();
    const Tensor& found = THPVariable_Unpack(object);
    if (!is_ordinary(found)) return refuse();
    if (dtype_ == at::ScalarType::Undefined) dtype_ = found.scalar_type();
    if (found.scalar_type() != dtype_ || !found.is_floating_point()) return refuse();
    if (found.is_inference())
      any_inference_ = true;
    else if (found.requires_grad() && at::GradMode::is_enabled())
      need_gradients = true;
    if (any_inference_ && need_gradients) return refuse();  // an inference tensor cannot be saved for a backward pass
    return found;
  }

  // The `count` states in `hx`: h, or a tuple of as many; empty, which stands for zeros, if it is None.
  std::vector<Tensor> states(PyObject* hx, int64_t count) {
    if (hx == Py_None) return {};
    if (count == 1) return {tensor(hx)};
    std::vector<Tensor> found;
    if (!PyTuple_Check(hx) || PyTuple_GET_SIZE(hx) != count)
      refuse();
    else
      for (int64_t i = 0; i < count; ++i) found.push_back(tensor(PyTuple_GET_ITEM(hx, i)));
    return found;
  }

  // lists: for each layer and direction, a list of `kWeights` tensors or None.
  Weights weights(const py::list& lists) {
    Weights found;
    for (const py::handle of_direction : lists) {
      if (!PyList_Check(of_direction.ptr()) || PyList_GET_SIZE(of_direction.ptr()) != kWeights) refuse();
      if (!fits) return {};
      for (const py::handle weight : py::reinterpret_borrow<py::list>(of_direction))
        found.push_back(weight.is_none() ? std::nullopt : std::optional<Tensor>(tensor(weight.ptr())));
    }
    return found;
  }

  Tensor refuse() {
    fits = false;
    return Tensor();
  }

 private:
  static const PyTypeObject* tensor_type() { return reinterpret_cast<const PyTypeObject*>(THPVariableClass); }
  static const PyTypeObject* parameter_type() { return reinterpret_cast<const PyTypeObject*>(ParameterClass); }

  at::ScalarType dtype_ = at::ScalarType::Undefined;
  bool any_inference_ = false;
};

bool sizes_fit(const std::string& cell, const Tensor& x, const std::vector<Tensor>& states, const Weights& weights) {
  if (weights.empty()) return false;
  for (size_t i = 0; i < weights.size(); i += kWeights)
    if (!weights[i] || !weights[i + 1]) return false;  // a cell without W_hh takes the other way
  const Tensor &w_ih = *weights[0], &w_hh = *weights[1];
  if (x.dim() != 3 || x.size(0) == 0 || w_ih.dim() != 2 || w_hh.dim() != 2 || x.size(2) != w_ih.size(1)) return false;
  const int64_t hidden = w_ih.size(0) / gates_of(cell), projected = w_hh.size(1);
  for (size_t i = 0; i < states.size(); ++i) {
    const int64_t width = i == 0 ? projected : hidden;
    if (states[i].dim() != 3 || states[i].size(1) != x.size(1) || states[i].size(2) != width) return false;
    if (states[i].size(0) * kWeights != int64_t(weights.size())) return false;
  }
  return true;
}

template <class Op>
const auto& op_of(const char* name) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Op>();
  return op;
}

// unsqueezed, squeezed: made below autograd, so that the result is not a view to autograd.
Tensor unsqueezed(const Tensor& tensor) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return tensor.unsqueeze(0);
}

Tensor squeezed(const Tensor& tensor) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return tensor.squeeze(0);
}

// Exchanges the first two dimensions of an output in place. The result is not a view, so that users may detach it or
// write to it in place. The version counter, by which LayerWithGradients detects writes, does not change.
void exchange_in_place(Tensor& output) {
  if (output.is_inference()) {
    output.transpose_(0, 1);
    return;
  }
  c10::VariableVersion version = torch::autograd::impl::version_counter(output);
  const int64_t before = version.current_version();
  output.transpose_(0, 1);
  version.set_version(before);
}

// The arguments of a layer's op.
struct OpCall {
  const std::string& cell;
  const Tensor& x;
  const std::vector<Tensor>& states;
  const Weights& weights;
  bool step;     // one step of a cell module: the caller's tensors lack T and D, and only final states are returned
  int64_t keep;  // rnnkit.call.Keep, used only if gradients are needed
  GradientRule rule;
};

// Replaces the first n saved tensors by the last n, which alias the data that they had in the forward pass. If the
// gradients are to be differentiated, the tensors themselves are needed: throws unless they still have that data.
void restore_data(variable_list& saved, size_t n, bool differentiated) {
  if (!differentiated) {
    std::copy_n(saved.end() - n, n, saved.begin());
    return;
  }
  for (size_t i = 0; i < n; ++i)
    TORCH_CHECK(saved[i].is_alias_of(*(saved.end() - n + i)),
                "expected input, hx and weights to keep their data until the backward pass, since its result is to be "
                "differentiated, got one whose .data was assigned to");
}

std::atomic<bool> flow_is_recorded{false};

// `_Layer` of rnnkit/autograd.py, for ordinary calls. It stores no backend: ordinary calls run on the C++ kernels.
class LayerWithGradients : public torch::autograd::Function<LayerWithGradients> {
 public:
  // tensors: the caller's input, states and weights, without those that are absent.
  static variable_list forward(torch::autograd::AutogradContext* ctx, const OpCall& call, at::TensorList tensors) {
    auto [outputs, results, reserve] =
        op_of<decltype(layer_forward)>("rnnkit::layer_forward")
            .call(call.cell, call.x, call.states, OptionalTensors(call.weights), std::nullopt, /*all_states=*/false,
                  call.rule.clip, call.rule.cut, /*reset=*/std::nullopt, /*operand_mask=*/std::nullopt,
                  /*zoneout=*/std::nullopt, /*kept=*/std::nullopt, /*heads=*/1, /*packed=*/std::nullopt, call.keep);
    const Tensor output = outputs[0];
    ctx->set_materialize_grads(false);
    auto& data = ctx->saved_data;
    data["cell"] = call.cell;
    data["step"] = call.step;
    data["keep"] = call.keep;
    if (call.rule.clip != GradientRule{}.clip) data["grad_clip"] = call.rule.clip;
    if (call.rule.cut != GradientRule{}.cut) data["grad_cut"] = call.rule.cut;
    data["states"] = int64_t(call.states.size());
    int64_t weights_there = 0;
    for (size_t i = 0; i < call.weights.size(); ++i) weights_there |= int64_t(call.weights[i].has_value()) << i;
    data["weights"] = int64_t(call.weights.size());
    data["weights there"] = weights_there;
    variable_list saved = tensors.vec();
    data["tensors"] = int64_t(saved.size());
    // A user may write to the output before the backward pass, as with torch.nn's: it is saved without autograd's check
    // of its version, and computed again if it was written to. A cell's step does not return it.
    saved.push_back(call.step ? output : output.variable_data());
    saved.push_back(reserve);
    // Aliases of the tensors' present data, in case a user assigns to .data later. Hooks of saved tensors, such as
    // save_on_cpu, keep the data themselves.
    if (!at::SavedTensorDefaultHooks::get_hooks())
      for (const Tensor& tensor : tensors) saved.push_back(tensor.variable_data());
    ctx->save_for_backward(std::move(saved));
    if (call.step) {
      for (Tensor& state : results) state = squeezed(state);
    } else {
      Tensor watch = at::empty({0}, output.options());
      torch::autograd::impl::set_version_counter(watch, torch::autograd::impl::version_counter(output));
      data["watch"] = watch;
      data["version"] = int64_t(watch._version());
      results.insert(results.begin(), output);
    }
    return results;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, variable_list grads) {
    auto& data = ctx->saved_data;
    const std::string cell = data["cell"].toStringRef();
    const bool step = data["step"].toBool();
    const int64_t keep = data["keep"].toInt();
    const auto clip = data.find("grad_clip"), cut = data.find("grad_cut");
    const double grad_clip = clip == data.end() ? GradientRule{}.clip : clip->second.toDouble();
    const int64_t grad_cut = cut == data.end() ? GradientRule{}.cut : cut->second.toInt();
    variable_list saved = ctx->get_saved_variables();
    const size_t n_states = data["states"].toInt(), n = data["tensors"].toInt();
    const Tensor output = saved[n], reserve = saved[n + 1];
    const bool records = flow_is_recorded.load(std::memory_order_relaxed);
    Tensor w_hh;  // as the caller gave it
    if (records) w_hh = saved.at(1 + n_states + 1);
    if (step) grads.insert(grads.begin(), Tensor());

    bool ordinary = ordinary_dispatch() && !at::GradMode::is_enabled();
    for (const Tensor& grad : grads) ordinary = ordinary && (!grad.defined() || is_ordinary(grad));
    if (saved.size() > n + 2) restore_data(saved, n, /*differentiated=*/!ordinary);
    const bool written = !step && data["watch"].toTensor()._version() != data["version"].toInt();

    // For a cell's step, the op takes and returns [1, N, H] instead of the caller's [N, H].
    const auto for_op = [&](const Tensor& tensor) { return step && tensor.defined() ? tensor.unsqueeze(0) : tensor; };
    const auto for_caller = [&](const Tensor& tensor) {
      if (!step || !tensor.defined()) return tensor;
      return ordinary ? squeezed(tensor) : tensor.squeeze(0);
    };
    std::vector<std::optional<Tensor>> op_grads;
    for (const Tensor& grad : grads)
      op_grads.push_back(grad.defined() ? std::optional<Tensor>(for_op(grad)) : std::nullopt);
    const Tensor x = for_op(saved[0]);
    std::vector<Tensor> states;
    for (size_t i = 0; i < n_states; ++i) states.push_back(for_op(saved[1 + i]));
    // For each saved tensor, its index among the op's input, states and weights, where absent weights count.
    std::vector<size_t> places;
    for (size_t i = 0; i < 1 + n_states; ++i) places.push_back(i);
    Weights weights(data["weights"].toInt());
    for (size_t i = 0, next = 1 + n_states; i < weights.size(); ++i) {
      if ((data["weights there"].toInt() >> i & 1) == 0) continue;
      weights[i] = saved.at(next++);
      places.push_back(1 + n_states + i);
    }
    c10::List<bool> needs;
    needs.resize(1 + n_states + weights.size(), false);
    for (size_t i = 0; i < n; ++i) needs.set(places[i], ctx->needs_input_grad(i));

    variable_list found(1 + n);  // the first argument, `call`, has no gradient
    if (ordinary && !written && !records) {
      const std::vector<Tensor> needed =
          op_of<decltype(layer_backward)>("rnnkit::layer_backward")
              .call(cell, x, states, OptionalTensors(weights), std::nullopt, /*all_states=*/false, grad_clip, grad_cut,
                    /*reset=*/std::nullopt, /*operand_mask=*/std::nullopt, /*zoneout=*/std::nullopt,
                    /*kept=*/std::nullopt, /*heads=*/1, OptionalTensors(op_grads), output, reserve, keep, needs,
                    /*flow=*/false);
      for (size_t i = 0, next = 0; i < n; ++i)
        if (needs.get(places[i])) found[1 + i] = needed.at(next++);
    } else {
      const py::gil_scoped_acquire acquired;
      const py::module_ calls = py::module_::import("rnnkit.call");
      const py::object layer_call =
          calls.attr("LayerCall")(cell, x, states, weights, py::none(), /*all_states=*/false, grad_clip, grad_cut);
      const py::object back = calls.attr("BackwardCall")(layer_call, op_grads, output, reserve, keep, needs.vec());
      const auto all = py::module_::import("rnnkit.autograd")
                           .attr("gradients")(back, written, records ? py::cast(w_hh) : py::none())
                           .cast<std::vector<std::optional<Tensor>>>();
      for (size_t i = 0; i < n; ++i) found[1 + i] = all.at(places[i]).value_or(Tensor());
    }
    for (size_t i = 0; i < 1 + n_states; ++i) found[1 + i] = for_caller(found[1 + i]);
    return found;
  }
};

struct Results {
  Tensor output;
  std::vector<Tensor> finals;
};

// x, states: the caller's tensors, which autograd records. Those of `call` are the op's: of a cell's step, unsqueezed.
Results with_gradients(const OpCall& call, const Tensor& x, const std::vector<Tensor>& states) {
  variable_list tensors = {x};
  tensors.insert(tensors.end(), states.begin(), states.end());
  for (const std::optional<Tensor>& weight : call.weights)
    if (weight) tensors.push_back(*weight);
  variable_list results = LayerWithGradients::apply(call, at::TensorList(tensors));
  if (call.step) return {Tensor(), std::move(results)};
  return {results[0], {results.begin() + 1, results.end()}};
}

Results without_gradients(const OpCall& call, const std::optional<Tensor>& packed) {
  auto [outputs, finals, reserve] =
      op_of<decltype(layer_forward)>("rnnkit::layer_forward")
          .call(call.cell, call.x, call.states, OptionalTensors(call.weights), std::nullopt, /*all_states=*/false,
                call.rule.clip, call.rule.cut, /*reset=*/std::nullopt, /*operand_mask=*/std::nullopt,
                /*zoneout=*/std::nullopt, /*kept=*/std::nullopt, /*heads=*/1, packed, int64_t(Keep::nothing));
  return {outputs[0], finals};
}

// The rows [directions, N, ...] of one layer in the states [layers * directions, N, ...].
std::vector<Tensor> states_of_layer(const std::vector<Tensor>& states, int64_t layer, int64_t directions) {
  std::vector<Tensor> found;
  for (const Tensor& state : states) found.push_back(state.narrow(0, layer * directions, directions));
  return found;
}

py::object as_states(const std::vector<Tensor>& finals) {
  if (finals.size() == 1) return py::cast(finals[0]);
  py::tuple states(finals.size());
  for (size_t i = 0; i < finals.size(); ++i) states[i] = py::cast(finals[i]);
  return states;
}

}  // namespace

void record_flow(bool records) { flow_is_recorded.store(records, std::memory_order_relaxed); }

py::object direct_layers(const std::string& cell, py::handle input, py::handle hx, const py::list& weights,
                         const std::vector<Tensor>& packed, int64_t directions, int64_t input_size, int64_t projected,
                         bool batch_first, int64_t keep, std::optional<double> grad_clip,
                         std::optional<int64_t> grad_cut) {
  Arguments arguments;
  if (!ordinary_dispatch()) return py::none();
  Tensor x = arguments.tensor(input.ptr());
  const std::vector<Tensor> states = arguments.states(hx.ptr(), states_of(cell));
  const Weights given = arguments.weights(weights);
  if (!arguments.fits || x.dim() != 3) return py::none();
  if (arguments.need_gradients && !packed.empty()) return py::none();
  if (directions != 1 && directions != 2) return py::none();
  const GradientRule rule{grad_clip.value_or(GradientRule{}.clip), grad_cut.value_or(GradientRule{}.cut)};
  const size_t per_layer = directions * kWeights, layers = given.size() / per_layer;
  if (layers * per_layer != given.size() || (!packed.empty() && packed.size() != layers)) return py::none();
  if (batch_first) x = x.transpose(0, 1);
  if (!sizes_fit(cell, x, states, given)) return py::none();
  if (x.size(2) != input_size || given[1]->size(1) != projected) return py::none();
  std::vector<Tensor> together;
  {
    const py::gil_scoped_release released;
    std::vector<std::vector<Tensor>> of_layers(states_of(cell));
    for (size_t layer = 0; layer < layers; ++layer) {
      const std::vector<Tensor> initial = layers == 1 ? states : states_of_layer(states, layer, directions);
      const auto first = given.begin() + layer * per_layer;
      const Weights own(first, first + per_layer);
      const OpCall call{cell, x, initial, own, /*step=*/false, keep, rule};
      Results results = arguments.need_gradients
                            ? with_gradients(call, x, initial)
                            : without_gradients(call, packed.empty() ? std::nullopt : std::optional(packed.at(layer)));
      x = results.output;
      for (size_t i = 0; i < of_layers.size(); ++i) of_layers[i].push_back(results.finals[i]);
    }
    for (const std::vector<Tensor>& finals : of_layers) together.push_back(layers == 1 ? finals[0] : at::cat(finals));
    if (batch_first) exchange_in_place(x);
  }
  return py::make_tuple(x, as_states(together));
}

py::object direct_cell(const std::string& cell, py::handle input, py::handle hx, const py::list& weights,
                       int64_t keep) {
  Arguments arguments;
  if (!ordinary_dispatch()) return py::none();
  const Tensor own_x = arguments.tensor(input.ptr());
  const std::vector<Tensor> own_states = arguments.states(hx.ptr(), states_of(cell));
  const Weights given = arguments.weights(weights);
  if (!arguments.fits || own_x.dim() != 2 || given.size() != kWeights) return py::none();
  const Tensor x = unsqueezed(own_x);
  std::vector<Tensor> states;
  for (const Tensor& state : own_states) {
    if (state.dim() != 2) return py::none();
    states.push_back(unsqueezed(state));
  }
  if (!sizes_fit(cell, x, states, given)) return py::none();
  std::vector<Tensor> finals;
  {
    const py::gil_scoped_release released;
    const OpCall call{cell, x, states, given, /*step=*/true, keep, {}};
    if (arguments.need_gradients) {
      finals = with_gradients(call, own_x, own_states).finals;
    } else {
      finals = without_gradients(call, std::nullopt).finals;
      for (Tensor& final : finals) final = squeezed(final);
    }
  }
  return as_states(finals);
}

}  // namespace rnnkit
