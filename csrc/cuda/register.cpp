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

const Persistent* find_persistent(std::string_view cell, Type type, bool backward, bool cluster, int units, int tiles) {
  const std::vector<Persistent>* table = table_of(type, backward);
  if (table == nullptr) return nullptr;
  for (const Persistent& kernel : *table)
    if (kernel.cell == cell && kernel.cluster == cluster && kernel.units == units && kernel.tiles == tiles)
      return &kernel;
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

  // c [rows, .] = a [rows, .] w, or a w^T, for `count` matrices of w [D, ., .] from `first` on; those of a and c lie
  // next_a and next_c elements apart.
  void run(const void* a, int64_t a_stride, int64_t next_a, const Tensor& w, int first, int count, bool transposed,
           void* c, int64_t c_stride, int64_t next_c, int64_t rows) const {
    const int64_t height = w.size(1), width = w.size(2);
    const void* from = moved(w.const_data_ptr(), first * height * width * bytes_of(type_));
    check(multiply({type_, transposed, precise_, rows, transposed ? height : width, transposed ? width : height, a,
                    from, c, a_stride, std::max<int64_t>(width, 1), c_stride, count, next_a, height * width, next_c},
                   blas_));
  }

 private:
  Type type_;
  bool precise_;
  void* blas_ = nullptr;
};

// What both passes of the persistent scan have in common. `plan`: a block's units, tiles and columns, and whether the
// blocks of a direction and slice are a cluster.
Scan scan_of(const std::vector<int64_t>& plan, int64_t element_bytes, const std::vector<Tensor>& weights,
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
  const int64_t groups = scan.directions * scan.slices;
  scan.precise = precise;
  if (plan[3]) return scan;
  const int64_t flags = groups * scan.blocks * kFlagStride * int64_t(sizeof(uint32_t));
  const int64_t exchanged = groups * 2 * chunks_of(hidden, element_bytes, parts) * scan.tiles() * kPieceBytes;
  STD_TORCH_CHECK(workspace.numel() >= flags + exchanged, "expected a workspace of ", flags + exchanged, " bytes, got ",
                  workspace.numel());
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

// Where the rows of each step lie, and which directions go together: those with as many rows in each step.
struct Order {
  std::vector<int64_t> counts, offsets;
  bool dense = true;

  explicit Order(std::vector<int64_t> of_each) : counts(std::move(of_each)) {
    offsets.push_back(0);
    for (const int64_t count : counts) {
      dense = dense && count == counts[0];
      offsets.push_back(offsets.back() + count);
    }
  }
  int64_t steps() const { return static_cast<int64_t>(counts.size()); }
  // The time of step s of a scan that begins at the end or not, and the row where it begins.
  int64_t time(int64_t s, bool from_end) const { return from_end ? steps() - 1 - s : s; }
  int64_t row(int64_t s, bool from_end) const { return offsets[time(s, from_end)]; }
  // Calls body(first direction, how many): both together save launches, where a step's product takes no longer than one.
  template <class Body>
  void each_group(int directions, const Tensor& w_hh, const Body& body) const {
    constexpr double kSmall = 1e9;  // floating-point operations
    if (dense && 2. * counts[0] * w_hh.size(1) * w_hh.size(2) < kSmall)
      body(0, directions);
    else
      for (int d = 0; d < directions; ++d) body(d, 1);
  }
};

// A step at a time. w_hh [D, G*H, P], w_hr [D, P, H]; h [D, N, P] is what is multiplied; states [D, N, H]; recurrent
// [D, N, G*H], unprojected [D, N, H].
void stepwise_forward(std::string cell, Tensor gates, Tensor w_hh, std::vector<Optional> b_ih,
                      std::vector<Optional> b_hh, Optional w_hr, std::vector<int64_t> counts, bool from_zero,
                      int64_t keep, bool precise, Tensor h, Tensor h_state, Optional c_state, Tensor recurrent,
                      Optional unprojected, Tensor output, Tensor reserve) {
  const Type type = type_of(gates);
  const int64_t bytes = bytes_of(type), sum_bytes = sum_bytes_of(type), batch = h.size(1), hidden = h_state.size(2);
  const int64_t width = w_hh.size(1), projected = w_hh.size(2), rows = output.size(0);
  const int64_t kept = keep == 0 ? 0 : reserve.size(2);
  const Guard guard(gates);
  const Stream stream = stream_of(gates);
  const Products products(type, precise);
  const Order order(std::move(counts));
  order.each_group(static_cast<int>(h.size(0)), w_hh, [&](int first, int count) {
    const auto of = [&](const Tensor& tensor, int d, int64_t size, int64_t element) {
      return moved(tensor.mutable_data_ptr(), d * size * element);
    };
    Steps steps{};
    steps.directions = count;
    for (int j = 0; j < count; ++j) {
      const int d = first + j;
      Step& step = steps.of[j];
      step.hidden = hidden;
      step.states[0] = of(h_state, d, batch * hidden, sum_bytes);
      step.states[1] = c_state ? of(*c_state, d, batch * hidden, sum_bytes) : nullptr;
      step.keep = static_cast<Keep>(keep);
      step.gate_stride = gates.size(1);
      step.b_ih = data(b_ih[d]);
      step.b_hh = data(b_hh[d]);
      step.h = w_hr ? of(*unprojected, d, batch * hidden, bytes) : of(h, d, batch * projected, bytes);
      step.output_stride = output.size(1);
    }
    void* const operand = of(h, first, batch * projected, bytes);
    void* const product = of(recurrent, first, batch * width, bytes);
    // Where all rows go on, a projection's product is written to the output, and read from there.
    const bool direct = w_hr && order.dense && count == 1;
    Rows last = {operand, projected};
    for (int64_t s = 0; s < order.steps(); ++s) {
      const bool zeros = s == 0 && from_zero;
      const int64_t alive = order.counts[order.time(s, first == 1)];
      if (!zeros)
        products.run(last.data, last.stride, batch * projected, w_hh, first, count, true, product, width, batch * width,
                     alive);
      for (int j = 0; j < count; ++j) {
        const int d = first + j;
        const int64_t row = order.row(s, d == 1);
        Step& step = steps.of[j];
        step.count = alive;
        step.recurrent = zeros ? nullptr : of(recurrent, d, batch * width, bytes);
        step.gates = moved(gates.const_data_ptr(), (row * step.gate_stride + d * width) * bytes);
        if (!w_hr) step.output = of(output, 1, row * step.output_stride + d * projected, bytes);
        if (kept) step.reserve = of(reserve, 1, (d * rows + row) * kept * hidden, sum_bytes);
      }
      check(launch_step(cell, type, false, steps, stream));
      if (!w_hr) continue;
      if (direct) {
        const int64_t row = order.row(s, first == 1);
        void* const to = of(output, 1, row * output.size(1) + first * projected, bytes);
        products.run(steps.of[0].h, hidden, 0, *w_hr, first, 1, true, to, output.size(1), 0, alive);
        last = {to, output.size(1)};
        continue;
      }
      products.run(steps.of[0].h, hidden, batch * hidden, *w_hr, first, count, true, operand, projected,
                   batch * projected, alive);
      for (int j = 0; j < count; ++j) {
        const int d = first + j;
        const int64_t row = order.row(s, d == 1);
        const Rows now = {of(h, d, batch * projected, bytes), projected};
        void* const to = of(output, 1, row * output.size(1) + d * projected, bytes);
        check(launch_add(type, {now, {}, to, output.size(1), alive, projected}, stream));
      }
    }
    if (direct) check(launch_add(type, {last, {}, operand, projected, order.counts[0], projected}, stream));
  });
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
  check(launch_step(cell, type, false, Steps{{step}, 1}, stream_of(gates)));
}

// The same backwards. grad_h [D, N, H], of Sum<S>, in: of the final state; out: of the initial state but for what comes
// through the weights, `grad_recurrent` [D, N, P], of as many rows as the last step has. With a projection that one is,
// in and out, all of it. grad_unprojected [D, N, H], grad_projected [D, rows, P].
void stepwise_backward(std::string cell, Tensor w_hh, Optional w_hr, std::vector<int64_t> counts, bool precise,
                       Tensor output, Optional h_0, Tensor reserve, Optional grad_output, Tensor grad_h,
                       Optional grad_c, Tensor grad_recurrent, Optional grad_unprojected, Optional grad_projected,
                       Tensor grad_gates, int64_t grads) {
  const Type type = type_of(output);
  const int64_t bytes = bytes_of(type), sum_bytes = sum_bytes_of(type), batch = grad_h.size(1), hidden = grad_h.size(2);
  const int64_t projected = w_hh.size(2), rows = output.size(0), kept = reserve.size(2);
  const Guard guard(output);
  const Stream stream = stream_of(output);
  const Products products(type, precise);
  const Order order(std::move(counts));
  order.each_group(static_cast<int>(grad_h.size(0)), w_hh, [&](int first, int count) {
    const auto of = [&](const Tensor& tensor, int d, int64_t size, int64_t element) {
      return moved(const_cast<void*>(tensor.const_data_ptr()), d * size * element);
    };
    Steps steps{};
    steps.directions = count;
    for (int j = 0; j < count; ++j) {
      const int d = first + j;
      Step& step = steps.of[j];
      step.hidden = hidden;
      step.output_stride = step.grad_output_stride = output.size(1);
      step.grad_states[0] = of(grad_h, d, batch * hidden, sum_bytes);
      step.grad_states[1] = grad_c ? of(*grad_c, d, batch * hidden, sum_bytes) : nullptr;
      step.grad_gate_stride = grad_gates.size(1);
      step.previous_initial = h_0 ? of(*h_0, d, batch * projected, bytes) : nullptr;
    }
    int64_t alive_before = 0;
    for (int64_t s = 0; s < order.steps(); ++s) {
      const int64_t alive = order.counts[order.time(s, first == 0)];
      for (int j = 0; j < count; ++j) {
        const int d = first + j;
        const int64_t t = order.time(s, d == 0), before = d == 0 ? t - 1 : t + 1, row = order.offsets[t];
        const int64_t wide = output.size(1), place = row * wide + d * projected;
        const bool starts = before < 0 || before == order.steps();
        Step& step = steps.of[j];
        step.count = alive;
        step.previous_count = starts ? 0 : order.counts[before];
        if (!starts) step.previous_output = of(output, 1, order.offsets[before] * wide + d * projected, bytes);
        step.output = of(output, 1, place, bytes);
        step.reserve = of(reserve, 1, (d * rows + row) * kept * hidden, sum_bytes);
        step.grad_gates = of(grad_gates, 1, row * step.grad_gate_stride + d * grads * hidden, bytes);
        const void* incoming = moved(data(grad_output), place * bytes);
        const void* through = of(grad_recurrent, d, batch * projected, bytes);
        if (w_hr) {
          void* of_step = of(*grad_projected, 1, (d * rows + row) * projected, bytes);
          check(
              launch_add(type, {{through, projected}, {incoming, wide}, of_step, projected, alive, projected}, stream));
          step.grad_recurrent = of(*grad_unprojected, d, batch * hidden, bytes);
          step.grad_recurrent_count = alive;
          products.run(of_step, projected, 0, *w_hr, d, 1, false, const_cast<void*>(step.grad_recurrent), hidden, 0,
                       alive);
        } else {
          step.grad_output = incoming;
          step.grad_recurrent = through;
          step.grad_recurrent_count = alive_before;
        }
      }
      check(launch_step(cell, type, true, steps, stream));
      // The gates' gradients of both directions lie in different rows: each its own product.
      for (int j = 0; j < count; ++j)
        products.run(steps.of[j].grad_gates, grad_gates.size(1), 0, w_hh, first + j, 1, false,
                     of(grad_recurrent, first + j, batch * projected, bytes), projected, 0, alive);
      alive_before = alive;
    }
  });
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
      "stepwise_forward(str cell, Tensor gates, Tensor w_hh, Tensor?[] b_ih, Tensor?[] b_hh, Tensor? w_hr,"
      " int[] counts, bool from_zero, int keep, bool precise, Tensor(a!) h, Tensor(b!) h_state, Tensor(c!)? c_state,"
      " Tensor(d!) recurrent, Tensor(e!)? unprojected, Tensor(f!) output, Tensor(g!) reserve) -> ()");
  m.def(
      "gates_again(str cell, Tensor gates, Tensor recurrent, Tensor? b_ih, Tensor? b_hh, int direction,"
      " Tensor(a!) h_state, Tensor(b!)? c_state, Tensor(c!) reserve) -> ()");
  m.def(
      "stepwise_backward(str cell, Tensor w_hh, Tensor? w_hr, int[] counts, bool precise, Tensor output, Tensor? h_0,"
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
