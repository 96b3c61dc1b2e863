#include "cuda/stepwise.h"

#include <algorithm>
#include <cstddef>

namespace rnnkit::cuda {
namespace {

// Both passes of one scan.
class Stepwise {
 public:
  Stepwise(std::string_view cell, Type type, const StepwiseScan& scan, Stream stream, void* blas)
      : cell_(cell),
        type_(type),
        scan_(scan),
        stream_(stream),
        blas_(blas),
        sizes_(sizes_of(cell)),
        w_hh_{scan.weight[0], sizes_.gates * scan.hidden, scan.projected},
        w_hr_{scan.w_hr, scan.projected, scan.hidden} {
    for (const int64_t count : scan.counts) {
      dense_ = dense_ && count == scan.batch;
      offsets_.push_back(offsets_.back() + count);
    }
  }

  // Runs a pass for both directions together, which saves launches where a step's product takes no longer than one, or
  // for each by itself.
  void run(void (Stepwise::*pass)(int first, int directions) const) const {
    constexpr double kSmall = 1e9;  // floating-point operations
    const int directions = int(scan_.directions);
    if (dense_ && 2. * double(scan_.batch) * double(w_hh_.height) * double(scan_.projected) < kSmall)
      (this->*pass)(0, directions);
    else
      for (int d = 0; d < directions; ++d) (this->*pass)(d, 1);
  }

  void forward(int first, int directions) const {
    const State& h = scan_.states[0];
    const Matrices initial = of_directions(h.initial, first, scan_.batch, scan_.projected);
    const Matrices operand = of_directions(h.final, first, scan_.batch, scan_.projected);
    const Matrices recurrent = of_directions(scan_.recurrent, first, scan_.batch, w_hh_.height);
    const Matrices masked = of_directions(scan_.masked, first, scan_.batch, scan_.projected);
    const Matrices unprojected = of_directions(scan_.unprojected, first, scan_.batch, scan_.hidden);
    Steps steps = begin(first, directions);
    for (int j = 0; j < directions; ++j) {
      steps.of[j].h = nth(scan_.w_hr ? unprojected : scan_.operand_mask ? masked : operand, j).data;
      if (!scan_.operand_mask) steps.of[j].states[0].final = nullptr;  // it is the operand
    }
    if (!dense_ && first == 1) add(initial, {}, operand, scan_.batch, scan_.projected);  // for rows that begin later
    // Where every row has every step and none is put back, a projection's product is written to the output, and read
    // from there.
    const bool direct = scan_.w_hr && dense_ && directions == 1 && !scan_.reset;
    if (scan_.operand_mask) mask(initial, first, directions, scan_.batch);
    Matrices last = initial;
    for (int64_t s = 0; s < scan_.steps; ++s) {
      const bool zeros = s == 0 && initial.data == nullptr;
      const int64_t active = scan_.counts[time(first, s)];
      if (!zeros) multiply(scan_.operand_mask ? masked : last, w_hh_, first, directions, true, recurrent, active);
      for (int j = 0; j < directions; ++j) {
        const int d = first + j;
        Step& step = steps.of[j];
        begin_step(step, d, s);
        step.rows = active;
        step.gates = moved(scan_.gates, (offsets_[time(d, s)] * scan_.gate_stride + d * w_hh_.height) * bytes());
        step.recurrent = zeros ? nullptr : nth(recurrent, j).data;
      }
      check(launch_step(cell_, type_, false, steps, stream_));
      last = operand;
      if (!scan_.w_hr || !(h.all || s + 1 < scan_.steps)) continue;
      if (direct) last = side_by_side(h.all, offsets_[time(first, s)], first, scan_.projected);
      multiply(unprojected, w_hr_, first, directions, true, last, active);
      for (int j = 0; j < directions && !direct; ++j)
        add(nth(operand, j), {}, side_by_side(h.all, offsets_[time(first + j, s)], first + j, scan_.projected), active,
            scan_.projected);
      for (int j = 0; j < directions && scan_.reset && s + 1 < scan_.steps; ++j) {
        const int d = first + j;
        check(launch_put_back(type_,
                              {nth(operand, j).data, of_directions(h.reset, d, scan_.batch, scan_.projected).data,
                               resets(d, s + 1), steps.of[j].carry.continuing(), scan_.projected},
                              stream_));
      }
      if (scan_.operand_mask && s + 1 < scan_.steps) mask(last, first, directions, active);
    }
    if (direct && operand.data) add(last, {}, operand, scan_.batch, scan_.projected);
  }

  void backward(int first, int directions) const {
    const State& h = scan_.states[0];
    const Matrices recurrent = of_directions(scan_.recurrent, first, scan_.batch, scan_.projected);
    const Matrices unprojected = of_directions(scan_.unprojected, first, scan_.batch, scan_.hidden);
    Steps steps = begin(first, directions);
    for (int j = 0; j < directions && scan_.w_hr; ++j)
      add(of_directions(h.grad_final, first + j, scan_.batch, scan_.projected), {}, nth(recurrent, j), scan_.batch,
          scan_.projected);
    for (int64_t s = scan_.steps - 1; s >= 0; --s) {
      const int64_t active = scan_.counts[time(first, s)];
      for (int j = 0; j < directions; ++j) {
        const int d = first + j;
        const int64_t t = time(d, s), row = offsets_[t];
        Step& step = steps.of[j];
        begin_step(step, d, s);
        if (step.carry.before > 0)
          step.previous_output = side_by_side(h.all, offsets_[time(d, s - 1)], d, scan_.projected).data;
        step.grad_gates = side_by_side(scan_.grad_gates, row, d, sizes_.columns(scan_) * scan_.hidden).data;
        step.grad_recurrent = nth(recurrent, j).data;
        step.grad_recurrent_rows = step.carry.after;
        step.cuts_before = cuts(d, s);
        step.cuts_after = cuts(d, s + 1);
        if (scan_.w_hr) {
          // The whole gradient of the projected h, for that of w_hr, and from it the gradient of h before its projection.
          const Matrices whole = {moved(scan_.grad_projected, (d * scan_.rows + row) * scan_.projected * bytes()),
                                  scan_.projected, 0};
          const Carry<int64_t>& carry = step.carry;
          void* const grad_reset = moved(h.grad_reset, d * scan_.batch * scan_.projected * sum_bytes());
          check(launch_add(type_,
                           {nth(recurrent, j), side_by_side(h.grad_all, row, d, scan_.projected), whole, active,
                            scan_.projected, mask_of(d), carry.after, scan_.rule, carry.after,
                            cuts(d, s + 1) ? carry.active : 0, step.resets_after, grad_reset},
                           stream_));
          multiply(whole, w_hr_, d, 1, false, nth(unprojected, j), active);
          step.grad_recurrent = nth(unprojected, j).data;
          step.grad_recurrent_rows = active;
        }
        step.rows = std::max(active, step.grad_recurrent_rows);
      }
      check(launch_step(cell_, type_, true, steps, stream_));
      if (s == 0 && !h.grad_initial) break;
      // The gates' gradients of both directions lie in different rows: each its own product.
      for (int j = 0; j < directions; ++j)
        multiply({steps.of[j].grad_gates, steps.of[j].grad_gate_stride, 0}, w_hh_, first + j, 1, false,
                 nth(recurrent, j), active);
    }
    initial_gradients(first, steps, recurrent);
  }

 private:
  // A matrix [height, width] of each direction, in one piece.
  struct Weight {
    const void* data;
    int64_t height, width;
  };

  int64_t bytes() const { return type_ == Type::float64 ? 8 : type_ == Type::float32 ? 4 : 2; }
  int64_t sum_bytes() const { return type_ == Type::float64 ? 8 : 4; }

  // The time of step s, in the order of the forward pass.
  int64_t time(int d, int64_t s) const { return d == 0 ? s : scan_.steps - 1 - s; }
  // Whether step s passes nothing back to the step before.
  bool cuts(int d, int64_t s) const {
    return s > 0 && s < scan_.steps && scan_.rule.cuts(std::max(time(d, s), time(d, s - 1)));
  }
  // Of the rows that have step s and the one before: whether they are put back between these; null where none is.
  const bool* resets(int d, int64_t s) const {
    const bool is_boundary = scan_.reset && s > 0 && s < scan_.steps;
    return is_boundary ? scan_.reset + offsets_[std::max(time(d, s), time(d, s - 1))] : nullptr;
  }
  int64_t count(int64_t t) const { return t < 0 || t >= scan_.steps ? 0 : scan_.counts[t]; }

  // An array [D, rows, width] of S from direction `first` on; and the `number`th matrix after that.
  Matrices of_directions(const void* data, int first, int64_t rows, int64_t width) const {
    return {moved(data, first * rows * width * bytes()), width, rows * width};
  }
  Matrices nth(const Matrices& from, int number) const {
    return {moved(from.data, number * from.next * bytes()), from.stride, from.next};
  }
  // The part of direction d in an array [rows, D*width] of S, from a row on.
  Matrices side_by_side(const void* data, int64_t row, int d, int64_t width) const {
    const int64_t stride = scan_.directions * width;
    return {moved(data, (row * stride + d * width) * bytes()), stride, 0};
  }
  const void* mask_of(int d) const { return of_directions(scan_.operand_mask, d, scan_.batch, scan_.projected).data; }

  // What stays the same from step to step. With a projection products stand between h's arrays and the cell.
  Steps begin(int first, int directions) const {
    Steps steps{};
    steps.directions = directions;
    for (int j = 0; j < directions; ++j) {
      const int d = first + j;
      Step& step = steps.of[j];
      step.hidden = scan_.hidden;
      step.stride = scan_.directions * scan_.hidden;
      step.values = sizes_.kept(scan_);
      step.keep = scan_.keep;
      step.rule = scan_.rule;
      step.projects = scan_.w_hr;
      step.gate_stride = scan_.gate_stride;
      step.grad_gate_stride = scan_.directions * sizes_.columns(scan_) * scan_.hidden;
      step.b_ih = scan_.b_ih[d];
      step.b_hh = scan_.b_hh[d];
      step.norms = scan_.norms[d];
      step.operand_mask = scan_.w_hr ? nullptr : mask_of(d);
      const int64_t size = scan_.batch * scan_.hidden;
      for (int k = 0; k < sizes_.states; ++k) {
        const State& from = scan_.states[k];
        step.states[k].value = moved(scan_.between, (k * scan_.directions + d) * size * sum_bytes());
        if (k == 0 && scan_.w_hr) continue;
        step.states[k].zones = from.zones;
        step.states[k].zoneout = from.zoneout;
        step.states[k].initial = moved(from.initial, d * size * (from.initial_is_wide ? sum_bytes() : bytes()));
        step.states[k].initial_is_wide = from.initial_is_wide;
        step.states[k].reset = moved(from.reset, d * size * bytes());
        step.states[k].grad_reset = moved(from.grad_reset, d * size * sum_bytes());
        step.states[k].final = moved(from.final, d * size * bytes());
        step.states[k].grad_final = moved(from.grad_final, d * size * bytes());
      }
    }
    return steps;
  }

  void begin_step(Step& step, int d, int64_t s) const {
    const int64_t t = time(d, s), row = offsets_[t];
    step.carry = {count(t), count(d == 0 ? t - 1 : t + 1), count(d == 0 ? t + 1 : t - 1)};
    step.resets_before = resets(d, s);
    step.resets_after = resets(d, s + 1);
    step.reserve = moved(scan_.reserve, (d * scan_.rows + row) * sizes_.kept(scan_) * scan_.hidden * sum_bytes());
    for (int k = scan_.w_hr ? 1 : 0; k < sizes_.states; ++k) {
      step.states[k].all = side_by_side(scan_.states[k].all, row, d, scan_.hidden).data;
      step.states[k].kept =
          static_cast<const bool*>(moved(scan_.states[k].kept, (row * scan_.directions + d) * scan_.hidden));
      step.states[k].grad_all = side_by_side(scan_.states[k].grad_all, row, d, scan_.hidden).data;
      step.states[k].flow = moved(scan_.states[k].flow, (row * scan_.directions + d) * scan_.hidden * sum_bytes());
    }
  }

  // After step 0 of the backward pass: a launch in which no row is active, and none is asked whether it is put back. It
  // adds the last product and writes the gradients of the initial states.
  void initial_gradients(int first, Steps& steps, const Matrices& recurrent) const {
    bool any = false;
    for (int j = 0; j < steps.directions; ++j) {
      const int d = first + j;
      Step& step = steps.of[j];
      step.carry = {};
      step.cuts_before = step.cuts_after = false;
      step.rows = scan_.batch;
      step.grad_recurrent_rows = scan_.w_hr ? 0 : count(time(d, 0));
      for (int k = 0; k < sizes_.states; ++k) {
        void* const grad = scan_.states[k].grad_initial;
        if (k == 0 && scan_.w_hr) {
          if (grad)
            add(nth(recurrent, j), {}, of_directions(grad, d, scan_.batch, scan_.projected), scan_.batch,
                scan_.projected, mask_of(d), scan_.batch);
        } else {
          step.states[k].grad_initial = of_directions(grad, d, scan_.batch, scan_.hidden).data;
          any = any || grad;
        }
      }
    }
    if (any) check(launch_step(cell_, type_, true, steps, stream_));
  }

  // c [rows, .] = a [rows, .] w, or a w^T, for the weights of `count` directions from `first` on.
  void multiply(const Matrices& a, const Weight& w, int first, int count, bool transposed, const Matrices& c,
                int64_t rows) const {
    Matrices b = of_directions(w.data, first, w.height, w.width);
    b.stride = std::max<int64_t>(b.stride, 1);
    const int64_t columns = transposed ? w.height : w.width, depth = transposed ? w.width : w.height;
    check(cuda::multiply({type_, transposed, scan_.precise, rows, columns, depth, a, b, c, count}, blas_));
  }
  void add(const Matrices& a, const Matrices& b, const Matrices& sum, int64_t rows, int64_t width,
           const void* mask = nullptr, int64_t passed_back = 0) const {
    check(
        launch_add(type_, {a, b, sum, rows, width, mask, rows, scan_.rule, passed_back, 0, nullptr, nullptr}, stream_));
  }
  // Writes the first rows of h, masked, of `directions` directions from `first` on.
  void mask(const Matrices& h, int first, int directions, int64_t rows) const {
    for (int d = first; d < first + directions; ++d)
      add(nth(h, d - first), {}, of_directions(scan_.masked, d, scan_.batch, scan_.projected), rows, scan_.projected,
          mask_of(d));
  }

  std::string_view cell_;
  Type type_;
  const StepwiseScan& scan_;
  Stream stream_;
  void* blas_;
  CellSizes sizes_;
  Weight w_hh_, w_hr_;
  bool dense_ = true;
  std::vector<int64_t> offsets_ = {0};  // row where each step begins
};

}  // namespace

void run_stepwise(std::string_view cell, Type type, bool backward, const StepwiseScan& scan, Stream stream,
                  void* blas) {
  const Stepwise pass(cell, type, scan, stream, blas);
  pass.run(backward ? &Stepwise::backward : &Stepwise::forward);
}

}  // namespace rnnkit::cuda
