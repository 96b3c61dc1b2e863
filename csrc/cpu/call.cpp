#include "cpu/call.h"

#include <ATen/Parallel.h>
#include <pthread.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>
#include <string>

#include "cpu/memory.h"

namespace rnnkit {

using at::Tensor;

namespace {

// Whether this process is the child of a fork. It has none of its parent's OpenMP threads, and libgomp would wait for
// them forever, so that a call in it uses one thread.
std::atomic<bool> forked{false};
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

// Throws the error that rnnkit.call.refuse raises about an op's arguments.
template <class... Others>
[[noreturn]] void refuse(const char* op, const Call& call, const Others&... others) {
  TORCH_CHECK(Py_IsInitialized(), "rnnkit::", op, " cannot take these arguments");
  const py::gil_scoped_acquire acquired;
  try {
    py::module_::import("rnnkit.call")
        .attr("refuse")(op, call.cell.name, call.input, call.states, call.weights.vec(), call.batch_sizes,
                        call.all_states, call.rule.clip, call.rule.cut, call.masks.reset, call.masks.operand,
                        call.masks.zoneout, call.masks.kept, call.heads, others...);
  } catch (py::error_already_set& error) {
    error.restore();
  }
  throw_python_error();
}

}  // namespace

void throw_python_error() {
  python_error error;
  error.persist();
  throw error;
}

Call::Call(std::string_view name, const Tensor& x, at::TensorList initial, const OptionalTensors& w,
           const std::optional<Tensor>& sizes, bool all, const GradientRule& of_gradients, Masks of_states,
           int64_t heads_of_each)
    : cell(find_cell(name)),
      input(x),
      states(initial.vec()),
      weights(w),
      batch_sizes(sizes),
      all_states(all),
      rule(of_gradients),
      masks(std::move(of_states)),
      heads(heads_of_each) {
  if (!fits()) refuse("layer_forward", *this);
}

bool Call::fits() {
  const int64_t count = weights.size();
  if (!(rule.clip >= 0) || rule.cut < 0 || heads < 1 || heads > count) return false;
  if (cell.registered != nullptr)
    kinds = kWeights + (cell.parameters > 0 ? 1 : 0);
  else
    kinds = count > 0 && count % ((kWeights + kNorms) * heads) == 0 ? kWeights + kNorms : kWeights;
  if (count != heads * kinds && count != 2 * heads * kinds) return false;
  directions = count / kinds;
  if (!input.is_floating_point() || input.dim() != (batch_sizes ? 2 : 3) || !has_memory(input)) return false;
  input_size = input.size(-1);
  if (batch_sizes) {
    if (!batch_sizes_fit()) return false;
  } else {
    steps = input.size(0);
    batch = input.size(1);
  }
  if (steps == 0 || !weights_fit()) return false;
  if (!masks_fit()) return false;
  const int64_t given = states.size();
  if (given != 0 && given != cell.states && !(masks.reset && given == 2 * cell.states)) return false;
  for (int64_t i = 0; i < given; ++i)
    if (!is_like_input(states[i], state_shape(i % cell.states))) return false;
  return true;
}

bool Call::masks_fit() const {
  if (masks.reset && !is_mask(*masks.reset, input.sizes().slice(0, input.dim() - 1))) return false;
  if (masks.operand && !is_like_input(*masks.operand, state_shape(0))) return false;
  const int64_t given = masks.zoneout.size();
  if (given != 0 && given != cell.states) return false;
  for (const double p : masks.zoneout)
    if (!(p >= 0 && p <= 1)) return false;
  if (given > 0 && masks.zoneout[0] > 0 && weight(0, 4)) return false;  // h has none with a projection
  if (!masks.kept) return true;
  if (given == 0) return false;
  std::vector<int64_t> shape = output_shape(cell.states - 1);
  shape.insert(shape.begin(), zoneouts_before(given));
  return is_mask(*masks.kept, shape);
}

int64_t Call::zoneouts_before(int64_t i) const {
  return std::count_if(masks.zoneout.begin(), masks.zoneout.begin() + i, [](double p) { return p > 0; });
}

std::optional<Tensor> Call::kept(int64_t i) const {
  if (!masks.kept || masks.zoneout[i] == 0) return std::nullopt;
  return masks.kept->select(0, zoneouts_before(i));
}

bool Call::is_mask(const Tensor& tensor, at::IntArrayRef shape) const {
  return tensor.scalar_type() == at::kBool && tensor.sizes() == shape && tensor.device() == input.device() &&
         has_memory(tensor);
}

// Whether batch_sizes are positive, do not increase and sum to the input's rows. Sets steps, batch and offsets.
bool Call::batch_sizes_fit() {
  if (batch_sizes->dim() != 1 || batch_sizes->scalar_type() != at::kLong || !batch_sizes->is_cpu()) return false;
  if (!has_memory(*batch_sizes)) return false;
  const Tensor held = batch_sizes->contiguous();
  const int64_t* const counts = held.const_data_ptr<int64_t>();
  steps = held.numel();
  batch = steps > 0 ? counts[0] : 0;
  offsets.reserve(steps + 1);
  offsets.push_back(0);
  for (int64_t t = 0; t < steps; ++t) {
    const bool too_many = counts[t] > (t == 0 ? batch : counts[t - 1]) || counts[t] > input.size(0) - offsets[t];
    if (counts[t] <= 0 || too_many) return false;
    offsets.push_back(offsets[t] + counts[t]);
  }
  return offsets.back() == input.size(0);
}

bool Call::weights_fit() {
  const bool recurs = cell.recurrent > 0;
  const bool multiplies = multiplies_input();
  for (int64_t d = 0; d < directions; ++d) {
    if (weight(d, 0).has_value() != multiplies || (multiplies && weight(d, 0)->dim() != 2)) return false;
    if (recurs && (!weight(d, 1) || weight(d, 1)->dim() != 2)) return false;
  }
  const bool projects = weight(0, 4).has_value();
  if (projects && (!cell.projects || weight(0, 4)->dim() != 2)) return false;
  hidden = recurs       ? weight(0, 1)->size(0) / cell.recurrent
           : multiplies ? weight(0, 0)->size(0) / cell.gates
                        : input_size / (directions * cell.gates);
  if (!multiplies && input_size != directions * cell.gates * hidden) return false;
  projected = recurs ? weight(0, 1)->size(1) : projects ? weight(0, 4)->size(0) : hidden;
  if (!projects && projected != hidden) return false;
  const int64_t gates = cell.gates * hidden, recurrent = cell.recurrent * hidden;
  const int64_t shapes[][2] = {{gates, input_size}, {recurrent, projected}, {gates}, {recurrent}, {projected, hidden}};
  const int64_t norm_shapes[] = {gates, recurrent, hidden, hidden}, unit_shape[] = {cell.parameters, hidden};
  const int64_t norms = cell.has_source ? kNorms : 2;
  for (int64_t d = 0; d < directions; ++d) {
    for (int64_t k = 0; k < kWeights; ++k) {
      const std::optional<Tensor> given = weight(d, k);
      if (k == 4 && given.has_value() != projects) return false;
      if (given && !recurs && (k == 1 || k == 3)) return false;
      const size_t dims = k < 2 || k == 4 ? 2 : 1;
      if (given && !is_like_input(*given, {shapes[k], dims})) return false;
    }
    for (int64_t k = 0; normalizes() && k < kNorms; ++k) {
      const std::optional<Tensor> given = weight(d, kWeights + k);
      if (given.has_value() != (k < norms)) return false;
      if (given && !is_like_input(*given, {norm_shapes + k, 1})) return false;
    }
    if (cell.parameters > 0 && (!weight(d, kWeights) || !is_like_input(*weight(d, kWeights), unit_shape))) return false;
  }
  return true;
}

bool Call::is_like_input(const Tensor& tensor, at::IntArrayRef shape) const {
  return tensor.sizes() == shape && tensor.scalar_type() == input.scalar_type() && tensor.device() == input.device() &&
         has_memory(tensor);
}

void Call::check_backward(const OptionalTensors& grads, const Tensor& output, const Tensor& reserve, int64_t keep,
                          const c10::List<bool>& needs, bool flow) const {
  const int64_t given = grads.size();
  bool fit = given == outputs() + cell.states && is_like_input(output, output_shape(0));
  for (int64_t i = 0; fit && i < given; ++i) {
    const std::optional<Tensor> grad = grads.get(i);
    if (grad && grad->defined())
      fit = is_like_input(*grad, i < outputs() ? output_shape(i) : state_shape(i - outputs()));
  }
  fit = fit && (keep == int64_t(Keep::states) || keep == int64_t(Keep::everything)) &&
        reserve.sizes() == reserve_shape(static_cast<Keep>(keep)) && reserve.scalar_type() == compute_type() &&
        reserve.device() == input.device() && has_memory(reserve);
  fit = fit && needs.size() == 1 + states.size() + weights.size();
  if (!fit) refuse("layer_backward", *this, grads.vec(), output, reserve, keep, needs.vec(), flow);
}

at::ScalarType Call::operand_type() const {
  const bool in_pairs = input_size % 2 == 0 && hidden % 2 == 0 && projected % 2 == 0;
  const bool direct =
      input.scalar_type() == at::kBFloat16 && in_pairs && cell.registered == nullptr && multiplies_bfloat16();
  return direct ? at::kBFloat16 : compute_type();
}

std::vector<int64_t> Call::output_shape(int64_t i) const {
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = directions * state_width(i);
  return shape;
}

std::vector<int64_t> Call::reserve_shape(Keep keep) const {
  if (keep == Keep::nothing) return {0};
  const bool has_expectation = !masks.zoneout.empty() && masks.zoneout[0] > 0 && !kept(0);
  const int64_t given = cell.uses_h && has_expectation ? 1 : 0;
  const int64_t products = keep == Keep::everything && normalizes() ? 2 * cell.gates : 0;
  return {directions, rows(), (keep == Keep::everything ? cell.saved : cell.states - 1) + given + products, hidden};
}

int Call::threads() const {
  if (forked.load(std::memory_order_relaxed) || at::in_parallel_region()) return 1;
  const double width = double(multiplies_input() ? input_size : 1) + projected;
  const double work = double(rows()) * directions * cell.gates * hidden * width;
  constexpr double kWorthOneThread = 200'000;  // multiply-adds
  return static_cast<int>(std::min<double>(at::get_num_threads(), 1 + work / kWorthOneThread));
}

}  // namespace rnnkit
