// What register.cpp (the ops and the module) and direct.cpp (the fast path from Python to the ops) use of each other.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <tuple>
#include <vector>

#include "cpu/call.h"

namespace rnnkit {

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor> layer_forward(
    std::string_view cell, const at::Tensor& input, at::TensorList states, const OptionalTensors& weights,
    const std::optional<at::Tensor>& batch_sizes, bool all_states, double grad_clip, int64_t grad_cut,
    const std::optional<at::Tensor>& reset, const std::optional<at::Tensor>& operand_mask,
    std::optional<at::ArrayRef<double>> zoneout, const std::optional<at::Tensor>& kept, int64_t heads,
    const std::optional<at::Tensor>& packed, int64_t keeps);

std::vector<at::Tensor> layer_backward(
    std::string_view cell, const at::Tensor& input, at::TensorList states, const OptionalTensors& weights,
    const std::optional<at::Tensor>& batch_sizes, bool all_states, double grad_clip, int64_t grad_cut,
    const std::optional<at::Tensor>& reset, const std::optional<at::Tensor>& operand_mask,
    std::optional<at::ArrayRef<double>> zoneout, const std::optional<at::Tensor>& kept, int64_t heads,
    const OptionalTensors& grads, const at::Tensor& output, const at::Tensor& reserve, int64_t keep,
    const c10::List<bool>& needs, bool flow);

int64_t gates_of(std::string_view cell);
int64_t states_of(std::string_view cell);

// Whether backward passes go by `gradients` of rnnkit/autograd.py, which hands the gradients of states to a recorder.
void record_flow(bool records);

// The fast paths of layers and cells. Both return None if the call is not an ordinary one, see direct.cpp.
// weights: a list of five for each layer and direction.
// packed: what `stack.pack` returned if the layer is frozen, else empty.
// input_size, projected (P): the module's attributes, which the weights have to fit.
// keep: rnnkit.call.Keep, used only if gradients are needed.
// grad_clip, grad_cut: the module's attributes, see GradientRule.
py::object direct_layers(const std::string& cell, py::handle input, py::handle hx, const py::list& weights,
                         const std::vector<at::Tensor>& packed, int64_t directions, int64_t input_size,
                         int64_t projected, bool batch_first, int64_t keep, std::optional<double> grad_clip,
                         std::optional<int64_t> grad_cut);  // (output, states)
py::object direct_cell(const std::string& cell, py::handle input, py::handle hx, const py::list& weights,
                       int64_t keep);  // states

}  // namespace rnnkit
