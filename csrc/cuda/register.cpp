// The GPU's scans as ops of torch, for rnnkit/gpu.py: unpacks tensors, finds the stream, launches. Built on torch's
// stable ABI, so that one binary serves every later torch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "cuda/kernels.h"

namespace rnnkit::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

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

const std::vector<Persistent>* table_of(Type type, bool backward) {
  switch (type) {
    case Type::bfloat16:
      return backward ? &backward_kernels(BFloat16()) : &forward_kernels(BFloat16());
    case Type::half:
      return backward ? &backward_kernels(Half()) : &forward_kernels(Half());
    case Type::float32:
      return backward ? &backward_kernels(float()) : &forward_kernels(float());
    default:
      return nullptr;
  }
}

const Persistent* find_persistent(std::string_view cell, Type type, bool backward, bool cluster, int units,
                                  int tiles) {
  const std::vector<Persistent>* table = table_of(type, backward);
  if (table == nullptr) return nullptr;
  for (const Persistent& kernel : *table)
    if (kernel.cell == cell && kernel.cluster == cluster && kernel.units == units && kernel.tiles == tiles) return &kernel;
  return nullptr;
}

int64_t bytes_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }
int64_t sum_bytes_of(Type type) { return type == Type::float64 ? 8 : 4; }

const void* data(const Optional& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
void* mutable_data(const Optional& tensor) { return tensor ? tensor->mutable_data_ptr() : nullptr; }
void* moved(void* from, int64_t bytes) { return from ? static_cast<std::byte*>(from) + bytes : nullptr; }
const void* moved(const void* from, int64_t bytes) { return moved(const_cast<void*>(from), bytes); }

#if defined(RNNKIT_HOST)  // the host build takes CPU tensors
#define RNNKIT_KEY CPU
struct Guard {
  explicit Guard(const Tensor&) {}
};
Stream stream_of(const Tensor&) { return nullptr; }
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
#endif

void check(const std::string& error) { STD_TORCH_CHECK(error.empty(), "rnnkit: ", error); }

// The products of one call, one after the other on its stream.
class Products {
 public:
  Products(Type type, bool precise) : type_(type), precise_(precise) {
#if !defined(RNNKIT_HOST)
    TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&blas_));
#endif
  }

  // c [rows, .] = a [rows, .] w, or a w^T.
  void run(const void* a, int64_t a_stride, const Tensor& w, bool transposed, void* c, int64_t c_stride,
           int64_t rows) const {
    const int64_t columns = w.size(transposed ? 0 : 1), depth = w.size(transposed ? 1 : 0);
    check(multiply({type_, transposed, precise_, rows, columns, depth, a, w.const_data_ptr(), c, a_stride,
                    std::max<int64_t>(w.size(1), 1), c_stride},
                   blas_));
  }

 private:
  Type type_;
  bool precise_;
  void* blas_ = nullptr;
};

// What both passes of the persistent scan have in common. `plan`: a block's units, tiles and columns, and whether the
// blocks of a direction and slice are a cluster.
Scan scan_of(const std::vector<int64_t>& plan, int64_t elements, const std::vector<Tensor>& weights,
             const Optional& offsets, int64_t steps, int64_t batch, int64_t hidden, int64_t rows,
             const Tensor& workspace, bool precise, int parts) {
  STD_TORCH_CHECK(plan.size() == 4, "expected a plan of 4 numbers, got ", plan.size());
  Scan scan{};
  scan.steps = steps;
  scan.batch = batch;
  scan.hidden = hidden;
  scan.directions = static_cast<int64_t>(weights.size());
  scan.rows = rows;
  scan.offsets = static_cast<const int64_t*>(data(offsets));
  scan.units = static_cast<int>(plan[0]);
  scan.columns = static_cast<int>(plan[2]);
  STD_TORCH_CHECK(scan.units > 0 && plan[1] > 0 && scan.columns > 0 && scan.columns % (8 * plan[1]) == 0,
                  "unexpected plan");
  scan.blocks = static_cast<int>((hidden + scan.units - 1) / scan.units);
  scan.slices = static_cast<int>((batch + scan.columns - 1) / scan.columns);
  for (size_t d = 0; d < weights.size(); ++d) scan.weight[d] = weights[d].const_data_ptr();
  const int64_t groups = scan.directions * scan.slices, vector = kVectorBytes / elements;
  scan.precise = precise;
  if (plan[3]) return scan;
  const int64_t flags = groups * scan.blocks * kFlagStride * int64_t(sizeof(uint32_t));
  const int64_t chunks = (hidden + 4 * vector - 1) / (4 * vector) * parts;
  const int64_t exchanged = groups * 2 * chunks * scan.tiles() * kPieceBytes;
  STD_TORCH_CHECK(workspace.numel() >= flags + exchanged, "expected a workspace of ", flags + exchanged,
                  " bytes, got ", workspace.numel());
  scan.exchanged = workspace.mutable_data_ptr();
  scan.flags = reinterpret_cast<uint32_t*>(static_cast<std::byte*>(workspace.mutable_data_ptr()) + exchanged);
  return scan;
}

void launch(const std::string& cell, Type type, bool backward, const std::vector<int64_t>& plan, const Scan& scan,
            const Tensor& on) {
  const Persistent* kernel =
      find_persistent(cell, type, backward, plan[3] != 0, static_cast<int>(plan[0]), static_cast<int>(plan[1]));
  STD_TORCH_CHECK(kernel != nullptr, "no persistent kernel for ", cell, " with ", plan[0], " units and ", plan[1],
                  " tiles");
  const Guard guard(on);
  check(launch_persistent(*kernel, scan, stream_of(on)));
}

void persistent_forward(std::string cell, std::vector<int64_t> plan, Tensor gates, std::vector<Tensor> w_hh,
                        std::vector<Optional> b_ih, std::vector<Optional> b_hh, Optional h_0, Optional c_0,
                        Optional offsets, int64_t steps, int64_t keep, bool precise, Tensor workspace, Tensor output,
                        Tensor h_n, Optional c_n, Tensor reserve) {
  const Type type = type_of(gates);
  Scan scan = scan_of(plan, bytes_of(type), w_hh, offsets, steps, h_n.size(1), h_n.size(2), output.size(0), workspace,
                      precise, 1);
  for (size_t d = 0; d < w_hh.size(); ++d) {
    scan.b_ih[d] = data(b_ih[d]);
    scan.b_hh[d] = data(b_hh[d]);
  }
  scan.gates = gates.const_data_ptr();
  scan.initial[0] = data(h_0);
  scan.initial[1] = data(c_0);
  scan.output = output.mutable_data_ptr();
  scan.final[0] = h_n.mutable_data_ptr();
  scan.final[1] = mutable_data(c_n);
  scan.keep = static_cast<Keep>(keep);
  scan.reserve = static_cast<float*>(reserve.mutable_data_ptr());
  launch(cell, type, false, plan, scan, gates);
}

// weights: w_hh of each direction, transposed.
void persistent_backward(std::string cell, std::vector<int64_t> plan, std::vector<Tensor> weights, Optional h_0,
                         Optional offsets, int64_t steps, int64_t batch, Tensor output, Tensor reserve,
                         Optional grad_output, Optional grad_h_n, Optional grad_c_n, bool precise, Tensor workspace,
                         Tensor grad_gates, Optional grad_h_0, Optional grad_c_0) {
  const Type type = type_of(output);
  const int64_t hidden = weights[0].size(0);
  Scan scan = scan_of(plan, bytes_of(type), weights, offsets, steps, batch, hidden, output.size(0), workspace, precise,
                      static_cast<int>(weights[0].size(1) / hidden));
  scan.initial[0] = data(h_0);
  scan.output = const_cast<void*>(output.const_data_ptr());
  scan.reserve = static_cast<float*>(const_cast<void*>(reserve.const_data_ptr()));
  scan.grad_output = data(grad_output);
  scan.grad_final[0] = data(grad_h_n);
  scan.grad_final[1] = data(grad_c_n);
  scan.grad_gates = grad_gates.mutable_data_ptr();
  scan.grad_initial[0] = mutable_data(grad_h_0);
  scan.grad_initial[1] = mutable_data(grad_c_0);
  launch(cell, type, true, plan, scan, output);
}

// A direction's steps: where the rows of step s, in the order of the scan, lie.
struct Steps {
  std::vector<int64_t> counts, offsets;
  bool backwards;

  Steps(std::vector<int64_t> of_each, bool reverse) : counts(std::move(of_each)), backwards(reverse) {
    offsets.push_back(0);
    for (const int64_t count : counts) offsets.push_back(offsets.back() + count);
  }
  int64_t steps() const { return static_cast<int64_t>(counts.size()); }
  int64_t time(int64_t s) const { return backwards ? steps() - 1 - s : s; }
};

// One direction, a step at a time. h: [N, P] what is multiplied; states: [N, H].
void stepwise_forward(std::string cell, Tensor gates, Tensor w_hh, Optional b_ih, Optional b_hh, Optional w_hr,
                      int64_t direction, std::vector<int64_t> counts, bool from_zero, int64_t keep, bool precise,
                      Tensor h, Tensor h_state, Optional c_state, Tensor recurrent, Optional unprojected, Tensor output,
                      Optional reserve) {
  const Type type = type_of(gates);
  const int64_t bytes = bytes_of(type), hidden = h_state.size(1), width = w_hh.size(0), projected = w_hh.size(1);
  const Guard guard(gates);
  const Stream stream = stream_of(gates);
  const Products products(type, precise);
  const Steps steps(std::move(counts), direction == 1);
  Step step{};
  step.hidden = hidden;
  step.states[0] = h_state.mutable_data_ptr();
  step.states[1] = mutable_data(c_state);
  step.keep = static_cast<Keep>(keep);
  step.gate_stride = gates.size(1);
  step.b_ih = data(b_ih);
  step.b_hh = data(b_hh);
  step.h = w_hr ? unprojected->mutable_data_ptr() : h.mutable_data_ptr();
  step.output_stride = output.size(1);
  const int64_t kept = keep == 0 ? 0 : reserve->size(1);
  for (int64_t s = 0; s < steps.steps(); ++s) {
    const int64_t t = steps.time(s), row = steps.offsets[t];
    step.count = steps.counts[t];
    const bool zeros = s == 0 && from_zero;
    if (!zeros)
      products.run(h.const_data_ptr(), projected, w_hh, true, recurrent.mutable_data_ptr(), width, step.count);
    step.recurrent = zeros ? nullptr : recurrent.const_data_ptr();
    step.gates = moved(gates.const_data_ptr(), (row * step.gate_stride + direction * width) * bytes);
    void* to = moved(output.mutable_data_ptr(), (row * step.output_stride + direction * projected) * bytes);
    step.output = w_hr ? nullptr : to;
    if (kept) step.reserve = moved(reserve->mutable_data_ptr(), row * kept * hidden * sum_bytes_of(type));
    check(launch_step(cell, type, false, step, stream));
    if (w_hr) {
      products.run(step.h, hidden, *w_hr, true, h.mutable_data_ptr(), projected, step.count);
      const Rows now = {h.const_data_ptr(), projected};
      check(launch_add(type, {now, {}, to, step.output_stride, step.count, projected}, stream));
    }
  }
}

// What Keep::everything keeps, for all rows of one direction at once. recurrent: [rows, G*H]; states: [rows, H], those
// before each step; they are written to.
void gates_again(std::string cell, Tensor gates, Tensor recurrent, Optional b_ih, Optional b_hh, int64_t direction,
                 Tensor h_state, Optional c_state, Tensor reserve) {
  const Type type = type_of(gates);
  const Guard guard(gates);
  Step step{};
  step.count = h_state.size(0);
  step.hidden = h_state.size(1);
  step.states[0] = h_state.mutable_data_ptr();
  step.states[1] = mutable_data(c_state);
  step.keep = Keep::everything;
  step.reserve = reserve.mutable_data_ptr();
  step.gates = moved(gates.const_data_ptr(), direction * recurrent.size(1) * bytes_of(type));
  step.gate_stride = gates.size(1);
  step.recurrent = recurrent.const_data_ptr();
  step.b_ih = data(b_ih);
  step.b_hh = data(b_hh);
  check(launch_step(cell, type, false, step, stream_of(gates)));
}

// The same backwards. grad_h: [N, H], of Sum<S>, in: of the final state; out: of the initial state but for what comes
// through the weights, `grad_recurrent` [N, P], of as many rows as the last step has. With a projection that one is, in
// and out, all of it.
void stepwise_backward(std::string cell, Tensor w_hh, Optional w_hr, int64_t direction, std::vector<int64_t> counts,
                       bool precise, Tensor output, Optional h_0, Tensor reserve, Optional grad_output, Tensor grad_h,
                       Optional grad_c, Tensor grad_recurrent, Optional grad_unprojected, Optional grad_projected,
                       Tensor grad_gates, int64_t grads) {
  const Type type = type_of(output);
  const int64_t bytes = bytes_of(type), hidden = grad_h.size(1), projected = w_hh.size(1);
  const Guard guard(output);
  const Stream stream = stream_of(output);
  const Products products(type, precise);
  const Steps steps(std::move(counts), direction == 0);
  Step step{};
  step.hidden = hidden;
  step.output_stride = step.grad_output_stride = output.size(1);
  step.grad_states[0] = grad_h.mutable_data_ptr();
  step.grad_states[1] = mutable_data(grad_c);
  step.grad_gate_stride = grad_gates.size(1);
  step.previous_initial = data(h_0);
  const int64_t kept = reserve.size(1);
  int64_t count_before = 0;
  for (int64_t s = 0; s < steps.steps(); ++s) {
    const int64_t t = steps.time(s), before = direction == 0 ? t - 1 : t + 1, row = steps.offsets[t];
    const int64_t place = row * step.output_stride + direction * projected;
    const bool starts = before < 0 || before == steps.steps();
    step.count = steps.counts[t];
    step.previous_count = starts ? 0 : steps.counts[before];
    if (!starts)
      step.previous_output = moved(output.const_data_ptr(),
                                   (steps.offsets[before] * step.output_stride + direction * projected) * bytes);
    step.output = moved(const_cast<void*>(output.const_data_ptr()), place * bytes);
    step.reserve = moved(const_cast<void*>(reserve.const_data_ptr()), row * kept * hidden * sum_bytes_of(type));
    step.grad_gates =
        moved(grad_gates.mutable_data_ptr(), (row * step.grad_gate_stride + direction * grads * hidden) * bytes);
    const void* incoming = moved(data(grad_output), place * bytes);
    if (w_hr) {
      void* of_step = moved(grad_projected->mutable_data_ptr(), row * projected * bytes);
      const Rows pending = {grad_recurrent.const_data_ptr(), projected}, given = {incoming, step.output_stride};
      check(launch_add(type, {pending, given, of_step, projected, step.count, projected}, stream));
      products.run(of_step, projected, *w_hr, false, grad_unprojected->mutable_data_ptr(), hidden, step.count);
      step.grad_recurrent = grad_unprojected->const_data_ptr();
      step.grad_recurrent_count = step.count;
    } else {
      step.grad_output = incoming;
      step.grad_recurrent = grad_recurrent.const_data_ptr();
      step.grad_recurrent_count = count_before;
    }
    check(launch_step(cell, type, true, step, stream));
    products.run(step.grad_gates, step.grad_gate_stride, w_hh, false, grad_recurrent.mutable_data_ptr(), projected,
                 step.count);
    count_before = step.count;
  }
}

}  // namespace
}  // namespace rnnkit::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(rnnkit, m) {
  m.def(
      "persistent_forward(str cell, int[] plan, Tensor gates, Tensor[] w_hh, Tensor?[] b_ih, Tensor?[] b_hh,"
      " Tensor? h_0, Tensor? c_0, Tensor? offsets, int steps, int keep, bool precise, Tensor(a!) workspace,"
      " Tensor(b!) output, Tensor(c!) h_n, Tensor(d!)? c_n, Tensor(e!) reserve) -> ()");
  m.def(
      "persistent_backward(str cell, int[] plan, Tensor[] weights, Tensor? h_0, Tensor? offsets, int steps, int batch,"
      " Tensor output, Tensor reserve, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, bool precise,"
      " Tensor(a!) workspace, Tensor(b!) grad_gates, Tensor(c!)? grad_h_0, Tensor(d!)? grad_c_0) -> ()");
  m.def(
      "stepwise_forward(str cell, Tensor gates, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, int direction,"
      " int[] counts, bool from_zero, int keep, bool precise, Tensor(a!) h, Tensor(b!) h_state, Tensor(c!)? c_state,"
      " Tensor(d!) recurrent, Tensor(e!)? unprojected, Tensor(f!) output, Tensor(g!)? reserve) -> ()");
  m.def(
      "gates_again(str cell, Tensor gates, Tensor recurrent, Tensor? b_ih, Tensor? b_hh, int direction,"
      " Tensor(a!) h_state, Tensor(b!)? c_state, Tensor(c!) reserve) -> ()");
  m.def(
      "stepwise_backward(str cell, Tensor w_hh, Tensor? w_hr, int direction, int[] counts, bool precise, Tensor output,"
      " Tensor? h_0,"
      " Tensor reserve, Tensor? grad_output, Tensor(a!) grad_h, Tensor(b!)? grad_c, Tensor(c!) grad_recurrent,"
      " Tensor(d!)? grad_unprojected, Tensor(e!)? grad_projected, Tensor(f!) grad_gates, int grads) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rnnkit, RNNKIT_KEY, m) {
  m.impl("persistent_forward", TORCH_BOX(&rnnkit::cuda::persistent_forward));
  m.impl("persistent_backward", TORCH_BOX(&rnnkit::cuda::persistent_backward));
  m.impl("stepwise_forward", TORCH_BOX(&rnnkit::cuda::stepwise_forward));
  m.impl("gates_again", TORCH_BOX(&rnnkit::cuda::gates_again));
  m.impl("stepwise_backward", TORCH_BOX(&rnnkit::cuda::stepwise_backward));
}
