// The CPU kernels of the ops in rnnkit/ops.py: checks, memory, choice of the kernels for this CPU, and the module
// `rnnkit._C`, whose loading registers them.
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <pthread.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "cpu/caches.h"
#include "cpu/direct.h"
#include "cpu/layer.h"
#include "cpu/peak.h"

namespace rnnkit {
namespace {

using at::Tensor;

constexpr const char* kWeightNames[] = {"w_ih", "w_hh", "b_ih", "b_hh", "w_hr"};
constexpr const char* kStateNames[] = {"hx[0]", "hx[1]"};
constexpr const char* kGradNames[] = {"grads[0]", "grads[1]", "grads[2]"};

// The child of a fork has none of its parent's OpenMP threads, and libgomp would wait for them.
std::atomic<bool> forked{false};

struct Capability {
  std::string name;
  CellTable cells;
  PeakLoops peak;
};

// The best kernels that were built and that this CPU runs, as torch sees it (ATEN_CPU_CAPABILITY can lower it).
Capability choose_capability() {
  [[maybe_unused]] const std::string name = at::get_cpu_capability();
#ifdef RNNKIT_HAS_AVX512
  if (name == "AVX512") return {"avx512", avx512::cells(), avx512::peak_loops()};
#endif
#ifdef RNNKIT_HAS_AVX2
  if (name == "AVX512" || name == "AVX2") return {"avx2", avx2::cells(), avx2::peak_loops()};
#endif
  return {"baseline", baseline::cells(), baseline::peak_loops()};
}

const Capability& capability() {
  static const Capability chosen = choose_capability();
  return chosen;
}

const CellKernels& find_cell(std::string_view name) {
  for (const CellKernels* cell = capability().cells.begin; cell != capability().cells.end; ++cell)
    if (name == cell->name) return *cell;
  TORCH_CHECK(false, "expected cell to be the name of a cell, got '", std::string(name), "'");
}

// Kernels that multiply bfloat16 directly, in the order of the cells; null where this CPU cannot.
const Kernels<BFloat16>* bfloat16_kernels() {
#ifdef RNNKIT_HAS_AVX512_BF16
  static const bool can = capability().name == "avx512" && __builtin_cpu_supports("avx512bf16");
  if (can) return avx512_bf16::bfloat16_cells();
#endif
  return nullptr;
}

// Whether bfloat16 is multiplied directly, and not as float. A CPU that has AMX takes twice as long for a vector of
// pairs of bfloat16 as for two vectors of float (docs/performance.md). RNNKIT_BFLOAT16=direct or float decides.
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

// What the CPU's units can do at most with this capability; benchmarks state speed as a share of it.
double peak_gflops(at::ScalarType type, int threads, double seconds) {
  MultiplyAdd loop = nullptr;
  if (type == at::kFloat) loop = capability().peak.f32;
  if (type == at::kDouble) loop = capability().peak.f64;
#ifdef RNNKIT_HAS_AVX512_BF16
  if (type == at::kBFloat16 && bfloat16_kernels())
    loop = multiplies_bfloat16() ? avx512_bf16::bfloat16_peak() : capability().peak.f32;
#endif
  TORCH_CHECK(loop, "expected dtype to be one that these kernels multiply, got ", type);
  TORCH_CHECK(threads > 0, "expected threads to be positive, got ", threads);
  return gflops(loop, threads, seconds);
}

double read_bandwidth(int64_t bytes, int threads, double seconds) {
  TORCH_CHECK(bytes > 0, "expected bytes to be positive, got ", bytes);
  TORCH_CHECK(threads > 0, "expected threads to be positive, got ", threads);
  return bytes_per_second(capability().peak.read, bytes, threads, seconds);
}

template <class S>
const Kernels<S>& kernels_of(const CellKernels& cell) {
  if constexpr (std::is_same_v<S, double>)
    return cell.f64;
  else if constexpr (std::is_same_v<S, float>)
    return cell.f32;
  else
    return bfloat16_kernels()[&cell - capability().cells.begin];
}

// Memory for results and between passes. Large parts are asked for in huge pages: the kernel then maps them at a
// quarter of the cost, and a scan finds them without a miss for each row.
Tensor allocate(at::IntArrayRef shape, const at::TensorOptions& options) {
  Tensor tensor = at::empty(shape, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + tensor.nbytes()) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

// That the tensor's memory is there: a storage can be freed, or cut, under it (resize_).
void check_memory(const Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.layout() == at::kStrided && tensor.has_storage(), "expected ", name,
              " to be an ordinary dense Tensor, got layout ", tensor.layout());
  const size_t size = tensor.itemsize(), offset = tensor.storage_offset();
  const size_t needed = tensor.is_contiguous()
                            ? (offset + tensor.numel()) * size
                            : at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), size, offset);
  TORCH_CHECK(tensor.storage().nbytes() >= needed || tensor.numel() == 0, "expected ", name, " to have ", needed,
              " bytes of memory, got ", tensor.storage().nbytes(), ": its storage was resized");
}

void check_shape(const Tensor& tensor, const char* name, at::IntArrayRef expected, const Tensor& input) {
  TORCH_CHECK(tensor.sizes() == expected, "expected ", name, " of shape ", expected, ", got ", tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), "expected ", name, " to be ", input.scalar_type(),
              " like the input, got ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == input.device(), "expected ", name, " on ", input.device(), " like the input, got ",
              tensor.device());
  check_memory(tensor, name);
}

// A call's arguments, checked, with their sizes and the rows of each step.
struct Call {
  const CellKernels& cell;
  const Tensor input;
  const std::vector<Tensor> states;
  const OptionalTensors& weights;
  int64_t steps, batch, input_size, hidden, projected, directions;
  std::vector<int64_t> offsets;  // of a packed sequence; else empty

  Call(std::string_view name, const Tensor& x, at::TensorList initial, const OptionalTensors& w,
       const std::optional<Tensor>& batch_sizes)
      : cell(find_cell(name)), input(x), states(initial.vec()), weights(w) {
    TORCH_CHECK(weights.size() == kWeights || weights.size() == 2 * kWeights,
                "expected weights to hold 5 tensors for each of 1 or 2 directions, got ", weights.size());
    directions = weights.size() / kWeights;
    TORCH_CHECK(input.is_floating_point(), "expected input to be floating-point, got ", input.scalar_type());
    TORCH_CHECK(input.dim() == (batch_sizes ? 2 : 3), "expected input to have ", batch_sizes ? 2 : 3,
                " dimensions, got ", input.dim());
    check_memory(input, "input");
    input_size = input.size(-1);
    set_steps(batch_sizes);
    check_weights();
    TORCH_CHECK(states.empty() || static_cast<int64_t>(states.size()) == cell.states, "expected ", cell.states,
                " states or none, got ", states.size());
    for (size_t i = 0; i < states.size(); ++i)
      check_shape(states[i], kStateNames[i], {directions, batch, i == 0 ? projected : hidden}, input);
  }

  void set_steps(const std::optional<Tensor>& batch_sizes) {
    if (!batch_sizes) {
      steps = input.size(0);
      batch = input.size(1);
    } else {
      offsets = {0};
      TORCH_CHECK(batch_sizes->dim() == 1 && batch_sizes->scalar_type() == at::kLong && batch_sizes->is_cpu(),
                  "expected batch_sizes to be an int64 vector on the CPU, got ", batch_sizes->scalar_type(),
                  " of shape ", batch_sizes->sizes(), " on ", batch_sizes->device());
      check_memory(*batch_sizes, "batch_sizes");
      const Tensor counts = batch_sizes->contiguous();
      steps = counts.numel();
      batch = steps > 0 ? counts.const_data_ptr<int64_t>()[0] : 0;
      int64_t before = batch;
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t count = counts.const_data_ptr<int64_t>()[t];
        TORCH_CHECK(count > 0 && count <= before, "expected batch_sizes to be positive and not to increase, got ",
                    count, " after ", before, " at step ", t);
        offsets.push_back(count);
        before = count;
      }
      for (int64_t t = 0; t < steps; ++t) {
        TORCH_CHECK(offsets[t + 1] <= input.size(0) - offsets[t], "expected batch_sizes to sum to the input's ",
                    input.size(0), " rows, got more");
        offsets[t + 1] += offsets[t];
      }
      TORCH_CHECK(offsets.back() == input.size(0), "expected batch_sizes to sum to the input's ", input.size(0),
                  " rows, got ", offsets.back());
    }
    TORCH_CHECK(steps > 0, "Expected sequence length to be larger than 0 in RNN");
  }

  void check_weights() {
    for (int64_t d = 0; d < directions; ++d)
      for (int64_t k = 0; k < 2; ++k) {
        TORCH_CHECK(weight(d, k), "expected ", kWeightNames[k], " of direction ", d, " to be a tensor, got None");
        TORCH_CHECK(weight(d, k)->dim() == 2, "expected ", kWeightNames[k], " to have 2 dimensions, got ",
                    weight(d, k)->dim());
      }
    hidden = weight(0, 1)->size(0) / cell.gates;
    projected = weight(0, 1)->size(1);
    const bool projects = weight(0, 4).has_value();
    TORCH_CHECK(!projects || cell.states == 2, "expected w_hr to be None for ", cell.name);
    TORCH_CHECK(projects || projected == hidden, "expected w_hh of shape ",
                at::IntArrayRef{cell.gates * hidden, hidden}, ", got ", weight(0, 1)->sizes());
    const int64_t gates = cell.gates * hidden;
    const int64_t shapes[][2] = {{gates, input_size}, {gates, projected}, {gates}, {gates}, {projected, hidden}};
    for (int64_t d = 0; d < directions; ++d)
      for (int64_t k = 0; k < kWeights; ++k) {
        TORCH_CHECK(k != 4 || weight(d, k).has_value() == projects, "expected w_hr in all directions or in none");
        if (weight(d, k))
          check_shape(*weight(d, k), kWeightNames[k], {shapes[k], k == 2 || k == 3 ? size_t(1) : size_t(2)}, input);
      }
  }

  std::optional<Tensor> weight(int64_t d, int64_t k) const { return weights.get(d * kWeights + k); }
  int64_t rows() const { return offsets.empty() ? steps * batch : offsets.back(); }
  bool empty() const { return rows() == 0 || hidden == 0; }

  // Low-precision tensors are computed with in float, and multiplied in it too unless the CPU does better.
  at::ScalarType compute_type() const { return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
  at::TensorOptions compute_options() const { return input.options().dtype(compute_type()); }
  at::ScalarType operand_type() const {
    const bool in_pairs = input_size % 2 == 0 && hidden % 2 == 0 && projected % 2 == 0;
    const bool direct = input.scalar_type() == at::kBFloat16 && in_pairs && multiplies_bfloat16();
    return direct ? at::kBFloat16 : compute_type();
  }
  at::TensorOptions operand_options() const { return input.options().dtype(operand_type()); }

  Tensor state_like(size_t i) const {
    const std::vector<int64_t> shape = {directions, batch, i == 0 ? projected : hidden};
    return empty() ? at::zeros(shape, compute_options()) : at::empty(shape, compute_options());
  }
  std::vector<int64_t> output_shape() const {
    std::vector<int64_t> shape = input.sizes().vec();
    shape.back() = directions * projected;
    return shape;
  }
  std::vector<int64_t> reserve_shape(Keep keep) const {
    const int64_t values = keep == Keep::everything ? cell.saved : cell.states - 1;
    return {directions, rows(), values, hidden};
  }

  // More threads only for work that outweighs waking them.
  int threads() const {
    if (forked.load(std::memory_order_relaxed) || at::in_parallel_region()) return 1;
    const double work = double(rows()) * directions * cell.gates * hidden * (input_size + projected);
    constexpr double kWorthOneThread = 200'000;  // multiply-adds
    return static_cast<int>(std::min<double>(at::get_num_threads(), 1 + work / kWorthOneThread));
  }
};

// Whether a signal's handler, in wants_to_stop, raised an exception. That is this thread's error indicator then.
thread_local bool interrupted = false;

// Lets Python handle signals, as it does only in its main thread.
bool wants_to_stop() {
  if (interrupted || syscall(SYS_gettid) != getpid()) return interrupted;
  const py::gil_scoped_acquire acquired;
  interrupted = PyErr_CheckSignals() != 0;
  return interrupted;
}

// torch's name for an element type of the kernels.
template <class S>
constexpr at::ScalarType kScalarType = c10::CppTypeToScalarType<S>::value;
template <>
constexpr at::ScalarType kScalarType<BFloat16> = at::kBFloat16;

template <class S>
S* data(const Tensor& tensor) {
  return static_cast<S*>(tensor.mutable_data_ptr());
}

// Holds the contiguous, converted tensors that a Layer points into.
class Pinned {
 public:
  template <class S>
  const S* read(const std::optional<Tensor>& tensor) {
    if (!tensor || !tensor->defined()) return nullptr;
    if (tensor->scalar_type() == kScalarType<S> && tensor->is_contiguous() && !tensor->is_neg())
      return static_cast<const S*>(tensor->const_data_ptr());  // the caller holds it
    kept_.push_back(tensor->to(kScalarType<S>).resolve_neg().contiguous());
    return static_cast<const S*>(kept_.back().const_data_ptr());
  }

 private:
  std::vector<Tensor> kept_;
};

template <class S>
Layer<S> make_layer(const Call& call, Pinned& pinned) {
  using T = Sum<S>;
  Layer<S> layer{};
  layer.steps = call.steps;
  layer.batch = call.batch;
  layer.input = call.input_size;
  layer.hidden = call.hidden;
  layer.projected = call.projected;
  layer.directions = call.directions;
  layer.offsets = call.offsets.empty() ? nullptr : call.offsets.data();
  for (int64_t d = 0; d < call.directions; ++d) {
    Direction<S>& direction = layer.direction[d];
    direction.w_ih = pinned.read<S>(call.weight(d, 0));
    direction.w_hh = pinned.read<S>(call.weight(d, 1));
    direction.b_ih = pinned.read<T>(call.weight(d, 2));
    direction.b_hh = pinned.read<T>(call.weight(d, 3));
    direction.w_hr = pinned.read<S>(call.weight(d, 4));
  }
  layer.x = pinned.read<S>(call.input);
  for (size_t i = 0; i < call.states.size(); ++i) layer.states[i].initial = pinned.read<T>(call.states[i]);
  layer.threads = call.threads();
  layer.wants_to_stop = wants_to_stop;
  return layer;
}

// Scratch memory for one call. A thread keeps up to 4 MiB for its next call: to map it anew would take longer than many
// a call does. A call has it for itself: a signal's handler may make another one meanwhile, on the same thread. Where
// tests ask torch to fill fresh memory, it is always fresh.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    constexpr int64_t most_kept = 4 << 20;
    const auto options = at::TensorOptions(at::kByte);
    const bool filled =
        at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory();
    if (bytes > most_kept || filled) {
      memory_ = allocate({bytes}, options);
      return;
    }
    memory_ = std::exchange(kept_, Tensor());
    if (!memory_.defined() || memory_.numel() < bytes) memory_ = at::empty({bytes}, options);
    keeps_ = true;
  }
  ~Scratch() {
    if (keeps_) kept_ = std::move(memory_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  std::byte* begin() const { return data<std::byte>(memory_); }

 private:
  static thread_local Tensor kept_;
  Tensor memory_;
  bool keeps_ = false;
};
thread_local Tensor Scratch::kept_;

// Runs the kernel; throws what a signal's handler raised meanwhile, such as KeyboardInterrupt.
template <class S>
void run(int64_t (*scratch)(const Layer<S>&), void (*kernel)(const Layer<S>&, std::byte*), const Layer<S>& layer) {
  interrupted = false;
  kernel(layer, Scratch(scratch(layer)).begin());
  if (!interrupted) return;
  const py::gil_scoped_acquire acquired;
  python_error error;
  error.persist();
  throw error;
}

// Calls body with a value of the type that the call's operands are multiplied in.
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

std::tuple<Tensor, std::vector<Tensor>, Tensor> forward(const Call& call, Keep keep,
                                                        const std::optional<Tensor>& packed) {
  const Tensor output = call.empty() ? at::zeros(call.output_shape(), call.operand_options())
                                     : allocate(call.output_shape(), call.operand_options());
  std::vector<Tensor> finals;
  for (int64_t i = 0; i < call.cell.states; ++i) finals.push_back(call.state_like(i));
  const std::vector<int64_t> nothing = {0};
  const Tensor reserve = allocate(keep == Keep::nothing ? nothing : call.reserve_shape(keep), call.compute_options());
  with_operand_type(call, [&](auto operand) {
    using S = decltype(operand);
    using T = Sum<S>;
    Pinned pinned;
    Layer<S> layer = make_layer<S>(call, pinned);
    layer.y = data<S>(output);
    for (size_t i = 0; i < finals.size(); ++i) layer.states[i].final = data<T>(finals[i]);
    layer.keep = keep;
    layer.reserve = data<T>(reserve);
    const Kernels<S>& kernels = kernels_of<S>(call.cell);
    if (packed) {
      const int64_t size = kernels.packed_size(layer);
      check_memory(*packed, "packed");
      TORCH_CHECK(packed->scalar_type() == at::kByte && packed->is_contiguous() && packed->numel() == size &&
                      reinterpret_cast<uintptr_t>(packed->const_data_ptr()) % 64 == 0 &&
                      kernels.check(layer, static_cast<const std::byte*>(packed->const_data_ptr())),
                  "expected packed to be ", size, " bytes from pack_weights, got ", packed->scalar_type(), " of shape ",
                  packed->sizes());
      layer.packed = static_cast<const std::byte*>(packed->const_data_ptr());
    }
    run(kernels.forward_scratch, kernels.forward, layer);
  });
  for (Tensor& state : finals) state = state.to(call.input.scalar_type());
  return {output.to(call.input.scalar_type()), finals, reserve};
}

}  // namespace

int64_t gates_of(std::string_view cell) { return find_cell(cell).gates; }
int64_t states_of(std::string_view cell) { return find_cell(cell).states; }

std::tuple<Tensor, std::vector<Tensor>, Tensor> layer_forward(std::string_view cell, const Tensor& input,
                                                              at::TensorList states, const OptionalTensors& weights,
                                                              const std::optional<Tensor>& batch_sizes, int64_t keep) {
  TORCH_CHECK(keep >= 0 && keep <= 2, "expected keep to be 0, 1 or 2, got ", keep);
  return forward(Call(cell, input, states, weights, batch_sizes), static_cast<Keep>(keep), std::nullopt);
}

std::tuple<Tensor, std::vector<Tensor>> packed_forward(std::string_view cell, const Tensor& input,
                                                       at::TensorList states, const OptionalTensors& weights,
                                                       const Tensor& packed, const std::optional<Tensor>& batch_sizes) {
  auto [output, finals, reserve] = forward(Call(cell, input, states, weights, batch_sizes), Keep::nothing, packed);
  return {output, finals};
}

namespace {

Tensor pack_weights(std::string_view cell, const OptionalTensors& weights) {
  TORCH_CHECK(weights.size() > 0 && weights.get(0) && weights.get(0)->dim() == 2,
              "expected weights to begin with w_ih of 2 dimensions");
  const Tensor w_ih = *weights.get(0);
  const Call call(cell, at::empty({1, 1, w_ih.size(1)}, w_ih.options()), {}, weights, std::nullopt);
  Tensor packed = at::empty({0}, at::kByte);
  with_operand_type(call, [&](auto operand) {
    using S = decltype(operand);
    Pinned pinned;
    const Layer<S> layer = make_layer<S>(call, pinned);
    const Kernels<S>& kernels = kernels_of<S>(call.cell);
    packed = allocate({kernels.packed_size(layer)}, at::kByte);
    kernels.pack(layer, data<std::byte>(packed));
  });
  return packed;
}

// Which of the kept values `reserve` holds; checked.
Keep kept_in(const Tensor& reserve, const Call& call) {
  const auto everything = call.reserve_shape(Keep::everything), only_states = call.reserve_shape(Keep::states);
  TORCH_CHECK((reserve.sizes() == everything || reserve.sizes() == only_states) &&
                  reserve.scalar_type() == call.compute_type() && reserve.is_cpu(),
              "expected reserve to be ", call.compute_type(), " of shape ", everything, " or ", only_states, ", got ",
              reserve.scalar_type(), " of shape ", reserve.sizes());
  check_memory(reserve, "reserve");
  return reserve.sizes() == everything ? Keep::everything : Keep::states;
}

}  // namespace

std::vector<Tensor> layer_backward(std::string_view cell, const OptionalTensors& grads, const Tensor& input,
                                   at::TensorList states, const OptionalTensors& weights,
                                   const std::optional<Tensor>& batch_sizes, const Tensor& output,
                                   const Tensor& reserve, const c10::List<bool>& needs) {
  const Call call(cell, input, states, weights, batch_sizes);
  TORCH_CHECK(static_cast<int64_t>(grads.size()) == 1 + call.cell.states, "expected grads of the output and of ",
              call.cell.states, " states, got ", grads.size());
  const std::vector<int64_t> shape = call.output_shape();
  check_shape(output, "output", shape, input);
  for (size_t i = 0; i < grads.size(); ++i) {
    const std::optional<Tensor> grad = grads.get(i);
    const std::vector<int64_t> state = {call.directions, call.batch, i == 1 ? call.projected : call.hidden};
    if (grad && grad->defined()) check_shape(*grad, kGradNames[i], i == 0 ? shape : state, input);
  }
  const Keep kept = kept_in(reserve, call);
  std::vector<Tensor> wanted = {input};
  wanted.insert(wanted.end(), call.states.begin(), call.states.end());
  for (size_t i = 0; i < weights.size(); ++i) wanted.push_back(weights.get(i).value_or(Tensor()));
  TORCH_CHECK(needs.size() == wanted.size(), "expected needs to have ", wanted.size(), " entries, got ", needs.size());

  std::vector<Tensor> results(wanted.size());
  for (size_t i = 0; i < wanted.size(); ++i)
    if (needs.get(i) && wanted[i].defined())
      results[i] = call.empty() ? at::zeros(wanted[i].sizes(), call.compute_options())
                                : allocate(wanted[i].sizes(), call.compute_options());
  with_operand_type(call, [&](auto operand) {
    using S = decltype(operand);
    using T = Sum<S>;
    Pinned pinned;
    Layer<S> layer = make_layer<S>(call, pinned);
    layer.y = const_cast<S*>(pinned.read<S>(output));  // only read in the backward pass
    layer.keep = kept;
    layer.reserve = const_cast<T*>(pinned.read<T>(reserve));
    layer.states[0].grad_all = pinned.read<T>(grads.get(0));
    for (int64_t i = 0; i < call.cell.states; ++i) layer.states[i].grad_final = pinned.read<T>(grads.get(i + 1));
    const auto write = [&](size_t i) { return results[i].defined() ? data<T>(results[i]) : nullptr; };
    layer.grad_x = write(0);
    for (size_t i = 0; i < call.states.size(); ++i) layer.states[i].grad_initial = write(1 + i);
    for (int64_t d = 0; d < call.directions; ++d) {
      const size_t first = 1 + call.states.size() + d * kWeights;
      Direction<S>& direction = layer.direction[d];
      T** places[] = {&direction.grad_w_ih, &direction.grad_w_hh, &direction.grad_b_ih, &direction.grad_b_hh,
                      &direction.grad_w_hr};
      for (int64_t k = 0; k < kWeights; ++k) *places[k] = write(first + k);
    }
    const Kernels<S>& kernels = kernels_of<S>(call.cell);
    run(kernels.backward_scratch, kernels.backward, layer);
  });
  std::vector<Tensor> needed;
  for (const Tensor& result : results)
    if (result.defined()) needed.push_back(result.to(input.scalar_type()));
  return needed;
}

namespace {

std::vector<std::tuple<std::string, int64_t, int64_t, int64_t>> list_cells() {
  std::vector<std::tuple<std::string, int64_t, int64_t, int64_t>> list;
  for (const CellKernels* cell = capability().cells.begin; cell != capability().cells.end; ++cell)
    list.emplace_back(cell->name, cell->gates, cell->states, cell->saved);
  return list;
}

}  // namespace

TORCH_LIBRARY_IMPL(rnnkit, CPU, m) {
  m.impl("layer_forward", layer_forward);
  m.impl("layer_backward", layer_backward);
  m.impl("packed_forward", packed_forward);
  m.impl("pack_weights", pack_weights);
}

// What calls share is atomic, of a thread, or made once: a Python without its lock need not turn it on.
#if PYBIND11_VERSION_HEX >= 0x020D0000
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m, py::mod_gil_not_used()) {
#else
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
#endif
  pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  m.doc() = "rnnkit's CPU kernels; importing it registers them with torch.";
  m.def("capability", [] { return capability().name; }, "The instruction set of the kernels in use.");
  m.def("multiplies_bfloat16", multiplies_bfloat16, "Whether bfloat16 is multiplied directly, and not as float.");
  m.def("direct_layers", direct_layers, "Layers where nothing is left to decide, or None.");
  m.def("direct_cell", direct_cell, "A cell's one step where nothing is left to decide, or None.");
  m.def("peak_gflops", peak_gflops, py::arg("dtype"), py::arg("threads"), py::arg("seconds"),
        py::call_guard<py::gil_scoped_release>(),
        "GFLOP/s that these threads reach now where they only multiply and add in registers.");
  m.def("read_bandwidth", read_bandwidth, py::arg("bytes"), py::arg("threads"), py::arg("seconds"),
        py::call_guard<py::gil_scoped_release>(),
        "Bytes a second that these threads read together now, each from so many bytes of its own.");
  m.def(
      "cache_sizes", [] { return std::make_tuple(cache_sizes().l1, cache_sizes().l2, cache_sizes().l3); },
      "Bytes of L1 (for data), L2 and L3; 0 for an L3 that the system does not tell.");
  m.def("cells", list_cells, "(name, gates, states, saved) of each cell, as in rnnkit.reference.CELLS.");
}

}  // namespace rnnkit
