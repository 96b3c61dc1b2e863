// One call of an op: its arguments, their sizes, and whether they fit together.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

#include "cpu/isa.h"

namespace rnnkit {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// Weights of one direction, see WEIGHTS in rnnkit/specs.py. After them follow those of NORMS with layer normalization,
// or `unit` of a registered cell with parameters.
constexpr int64_t kWeights = 5, kNorms = 4;

// How the backward pass changes what a step passes back, see `LayerCall` of rnnkit/call.py.
struct GradientRule {
  double clip = 0;  // 0: no limit
  int64_t cut = 0;  // 0: no cuts
};

// What changes the states between steps, see `LayerCall`: the masks of resets, of the recurrent operand and of zoneout.
struct Masks {
  std::optional<at::Tensor> reset, operand;
  std::vector<double> zoneout;
  std::optional<at::Tensor> kept;
};

// `LayerCall` of rnnkit/call.py in C++. The constructor throws the error of `LayerCall.check` if arguments do not fit.
struct Call {
  const CellKernels& cell;
  const at::Tensor input;
  const std::vector<at::Tensor> states;  // initial states, then those that `reset` puts back to; see LayerCall
  const OptionalTensors weights;
  const std::optional<at::Tensor> batch_sizes;
  const bool all_states;
  const GradientRule rule;
  const Masks masks;
  const int64_t heads;  // of each direction; `directions` counts them all, see layer.h
  int64_t steps = 0, batch = 0, input_size = 0, hidden = 0, projected = 0, directions = 0;
  int64_t kinds = kWeights;      // weights of one direction
  std::vector<int64_t> offsets;  // of a packed sequence: the row where each step begins, then rows(); else empty

  Call(std::string_view name, const at::Tensor& x, at::TensorList initial, const OptionalTensors& w,
       const std::optional<at::Tensor>& sizes, bool all_states, const GradientRule& rule = {}, Masks masks = {},
       int64_t heads = 1);

  // Checks the other arguments of layer_backward. Throws the error of `BackwardCall.check` if they do not fit.
  void check_backward(const OptionalTensors& grads, const at::Tensor& output, const at::Tensor& reserve, int64_t keep,
                      const c10::List<bool>& needs, bool flow) const;

  std::optional<at::Tensor> weight(int64_t d, int64_t k) const { return weights.get(d * kinds + k); }
  bool normalizes() const { return kinds == kWeights + kNorms; }
  bool multiplies_input() const { return weight(0, 0).has_value(); }
  int64_t rows() const { return offsets.empty() ? steps * batch : offsets.back(); }
  bool empty() const { return rows() == 0 || hidden == 0; }

  // compute_type: the type of cells, sums and the reserve; float for low-precision tensors.
  // operand_type: the type of the products' operands; compute_type unless the CPU multiplies bfloat16 directly.
  at::ScalarType compute_type() const { return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
  at::TensorOptions compute_options() const { return input.options().dtype(compute_type()); }
  at::ScalarType operand_type() const;
  at::TensorOptions operand_options() const { return input.options().dtype(operand_type()); }

  // The width of state i: P for h, which is state 0, and H for the others.
  int64_t state_width(int64_t i) const { return i == 0 ? projected : hidden; }
  std::vector<int64_t> state_shape(int64_t i) const { return {directions, batch, state_width(i)}; }
  // `LayerCall.kept_of`
  std::optional<at::Tensor> kept(int64_t i) const;
  int64_t outputs() const { return all_states ? cell.states : 1; }
  std::vector<int64_t> output_shape(int64_t i) const;
  std::vector<int64_t> reserve_shape(Keep keep) const;

  // The max number of threads for this call: more than one only if the work outweighs waking them.
  int threads() const;

 private:
  bool fits();
  bool masks_fit() const;
  int64_t zoneouts_before(int64_t i) const;  // how many of the states before state i have zoneout
  bool is_mask(const at::Tensor& tensor, at::IntArrayRef shape) const;
  bool batch_sizes_fit();
  bool weights_fit();
  bool is_like_input(const at::Tensor& tensor, at::IntArrayRef shape) const;
};

// Throws this thread's Python error as torch's C++ code does. The caller holds the GIL.
[[noreturn]] void throw_python_error();

}  // namespace rnnkit
