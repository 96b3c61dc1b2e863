// The short way of an inference call: from a module's arguments to the op and back in one call from Python, for small
// layers are computed in less time than Python takes to look at their arguments. It is taken where nothing is left to
// decide: no gradient, no autocast, no transform or subclass, arguments that fit. Else Python goes its own way, and
// finds what is wrong.
#include <ATen/ATen.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/extension.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/direct.h"

namespace rnnkit {
namespace {

using at::Tensor;

// Whether nothing but this thread's ordinary dispatch is to see the call.
bool ordinary_dispatch() {
  constexpr auto ordinary = c10::DispatchKeySet({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
  const bool others = (c10::impl::tls_local_dispatch_key_set().included_.raw_repr() & ~ordinary.raw_repr()) != 0;
  return !others && !at::autocast::is_autocast_enabled(at::kCPU) && !at::impl::torch_function_mode_enabled();
}

// Reads tensors from Python; `fits` turns false at the first that is not an ordinary one like the first of all.
class Arguments {
 public:
  bool fits = true;

  Tensor tensor(PyObject* object) {
    const PyTypeObject* type = Py_TYPE(object);
    if (!fits || (type != tensor_type() && type != parameter_type())) return refuse();
    const Tensor& found = THPVariable_Unpack(object);
    constexpr auto ordinary = c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                                   c10::DispatchKey::AutocastCPU, c10::DispatchKey::ADInplaceOrView});
    if ((found.key_set().raw_repr() & ~ordinary.raw_repr()) != 0) return refuse();
    if (dtype_ == at::ScalarType::Undefined) dtype_ = found.scalar_type();
    if (found.scalar_type() != dtype_ || !found.is_floating_point()) return refuse();
    if (found.requires_grad() && at::GradMode::is_enabled() && !found.is_inference()) return refuse();
    if (found.unsafeGetTensorImpl()->has_storage() && found._fw_grad(0).defined()) return refuse();
    return found;
  }

  // h, or h and c, or nothing for zeros.
  std::vector<Tensor> states(PyObject* hx, bool pair) {
    if (hx == Py_None) return {};
    if (!pair) return {tensor(hx)};
    if (!PyTuple_Check(hx) || PyTuple_GET_SIZE(hx) != 2) {
      refuse();
      return {};
    }
    return {tensor(PyTuple_GET_ITEM(hx, 0)), tensor(PyTuple_GET_ITEM(hx, 1))};
  }

  // A list of `kWeights` for each layer and direction.
  std::vector<std::optional<Tensor>> weights(const py::list& lists) {
    std::vector<std::optional<Tensor>> found;
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
};

bool sizes_fit(const std::string& cell, const Tensor& x, const std::vector<Tensor>& states,
               const std::vector<std::optional<Tensor>>& weights) {
  if (weights.empty()) return false;
  for (size_t i = 0; i < weights.size(); i += kWeights)
    if (!weights[i] || !weights[i + 1]) return false;
  const Tensor &w_ih = *weights[0], &w_hh = *weights[1];
  if (x.dim() != 3 || x.size(0) == 0 || w_ih.dim() != 2 || w_hh.dim() != 2 || x.size(2) != w_ih.size(1)) return false;
  const int64_t sizes[] = {w_hh.size(1), w_hh.size(0) / gates_of(cell)};  // of h and of c
  for (size_t i = 0; i < states.size(); ++i) {
    if (states[i].dim() != 3 || states[i].size(1) != x.size(1) || states[i].size(2) != sizes[i]) return false;
    if (states[i].size(0) * kWeights != int64_t(weights.size())) return false;
  }
  return true;
}

template <class Op>
const auto& op_of(const char* name) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Op>();
  return op;
}

std::tuple<Tensor, std::vector<Tensor>> run_layer(const std::string& cell, const Tensor& x,
                                                  const std::vector<Tensor>& states, const OptionalTensors& weights,
                                                  const Tensor* packed) {
  if (packed != nullptr)
    return op_of<decltype(packed_forward)>("rnnkit::packed_forward")
        .call(cell, x, states, weights, *packed, std::nullopt);
  auto [output, finals, reserve] =
      op_of<decltype(layer_forward)>("rnnkit::layer_forward").call(cell, x, states, weights, std::nullopt, 0);
  return {output, finals};
}

std::tuple<Tensor, std::vector<Tensor>> run_layers(const std::string& cell, Tensor x, const std::vector<Tensor>& states,
                                                   const std::vector<std::optional<Tensor>>& weights,
                                                   const std::vector<Tensor>& packed, int64_t directions) {
  const size_t per_layer = directions * kWeights, layers = weights.size() / per_layer;
  std::vector<std::vector<Tensor>> finals;
  for (size_t layer = 0; layer < layers; ++layer) {
    std::vector<Tensor> initial = states;
    if (layers > 1)
      for (Tensor& state : initial) state = state.narrow(0, layer * directions, directions);
    const auto first = weights.begin() + layer * per_layer;
    const std::vector<std::optional<Tensor>> own(first, first + per_layer);
    const Tensor* of_layer = packed.empty() ? nullptr : &packed.at(layer);
    auto [output, final] = run_layer(cell, x, initial, OptionalTensors(own), of_layer);
    x = output;
    finals.push_back(final);
  }
  if (layers == 1) return {x, finals[0]};
  std::vector<Tensor> together;
  for (size_t i = 0; i < finals[0].size(); ++i) {
    std::vector<Tensor> of_layers;
    for (const std::vector<Tensor>& final : finals) of_layers.push_back(final[i]);
    together.push_back(at::cat(of_layers));
  }
  return {x, together};
}

py::object as_states(const std::vector<Tensor>& finals) {
  return finals.size() == 1 ? py::cast(finals[0]) : py::make_tuple(finals[0], finals[1]);
}

}  // namespace

py::object infer_layers(const std::string& cell, py::handle input, py::handle hx, const py::list& weights,
                        const std::vector<Tensor>& packed, int64_t directions, bool batch_first) {
  Arguments arguments;
  if (!ordinary_dispatch()) return py::none();
  Tensor x = arguments.tensor(input.ptr());
  const std::vector<Tensor> states = arguments.states(hx.ptr(), states_of(cell) == 2);
  const std::vector<std::optional<Tensor>> given = arguments.weights(weights);
  if (!arguments.fits || x.dim() != 3) return py::none();
  if (batch_first) x = x.transpose(0, 1);
  if (!sizes_fit(cell, x, states, given)) return py::none();
  std::tuple<Tensor, std::vector<Tensor>> results;
  {
    const py::gil_scoped_release released;
    results = run_layers(cell, x, states, given, packed, directions);
    if (batch_first) std::get<0>(results) = std::get<0>(results).transpose(0, 1);
  }
  return py::make_tuple(std::get<0>(results), as_states(std::get<1>(results)));
}

py::object infer_cell(const std::string& cell, py::handle input, py::handle hx, const py::list& weights) {
  Arguments arguments;
  if (!ordinary_dispatch()) return py::none();
  Tensor x = arguments.tensor(input.ptr());
  std::vector<Tensor> states = arguments.states(hx.ptr(), states_of(cell) == 2);
  const std::vector<std::optional<Tensor>> given = arguments.weights(weights);
  if (!arguments.fits || x.dim() != 2) return py::none();
  x = x.unsqueeze(0);
  for (Tensor& state : states) {
    if (state.dim() != 2) return py::none();
    state = state.unsqueeze(0);
  }
  if (!sizes_fit(cell, x, states, given)) return py::none();
  std::vector<Tensor> finals;
  {
    const py::gil_scoped_release released;
    finals = std::get<1>(run_layers(cell, x, states, given, {}, 1));
    for (Tensor& final : finals) final = final.squeeze(0);
  }
  return as_states(finals);
}

}  // namespace rnnkit
