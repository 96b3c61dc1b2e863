// The weights and biases that make the gates, for all directions, and the cell's forward on a row of gates. Gates come
// in panels of some hidden units (Cell::units), so that the cell works on a product that is still in L1.
#pragma once

#include "cpu/kernels/matrix.h"
#include "cpu/kernels/scan.h"
#include "cpu/kernels/shape.h"

namespace rnnkit::RNNKIT_CAPABILITY {

template <class Cell>
struct PanelOf {
  using Type = FixedPanel<Cell::gates, Cell::units>;
};
template <>
struct PanelOf<Registered> {
  using Type = AnyPanel;
};

template <class Cell, class S>
class Gates {
 public:
  using T = Sum<S>;
  using V = Vector<T>;
  using OfGates = TransposedMatrix<S, typename PanelOf<Cell>::Type>;
  using OfProjection = TransposedMatrix<S, FixedPanel<1, kPanel>>;

  PerDirection<OfGates> w_ih, w_hh, w_late;  // w_hh: of the recurrent gates that are made of h; w_late: of the others
  PerDirection<OfProjection> w_hr;

  // A matrix that is not packed is read where the layer has it.
  Gates(const Layer<S>& layer, bool pack_input, bool pack_recurrent, bool pack_projection, Arena& arena)
      : w_ih(layer.directions),
        w_hh(layer.directions),
        w_late(layer.directions),
        w_hr(layer.directions),
        layer_(layer),
        bias_(layer.directions) {
    const int64_t I = layer.input, H = layer.hidden, P = layer.projected;
    const auto of_input = panel(shape().gates), of_recurrent = panel(shape().early), of_late = panel(shape().late);
    for (int64_t d = 0; d < layer.directions; ++d) {
      const Direction<S>& weights = layer.direction[d];
      w_ih[d] = {of_input, weights.w_ih, H, I,
                 arena.take<S>(pack_input && layer.multiplies_input ? OfGates::packed_size(of_input, H, I) : 0)};
      w_hh[d] = {of_recurrent, weights.w_hh, H, P,
                 arena.take<S>(pack_recurrent ? OfGates::packed_size(of_recurrent, H, P) : 0)};
      if (shape().late > 0)
        w_late[d] = {of_late, weights.w_hh + shape().early * H * P, H, P,
                     arena.take<S>(pack_recurrent ? OfGates::packed_size(of_late, H, P) : 0)};
      w_hr[d] = {{}, weights.w_hr, P, H, arena.take<S>(pack_projection ? OfProjection::packed_size({}, P, H) : 0)};
      bias_[d] = arena.take<T>(panels() * bias_size());
    }
  }

  // Hidden units in a panel; columns of a panel of w_ih's and of w_hh's product.
  int64_t units() const { return shape().units; }
  int64_t input_width() const { return shape().gates * units(); }
  int64_t recurrent_width() const { return shape().recurrent * units(); }

  int64_t panels() const { return OfGates::panels(panel(shape().gates), layer_.hidden); }
  int64_t units_in(int64_t p) const { return w_ih[0].units_in(p); }

  // Packs the weights and lays out the biases and parameters, this thread's part of them.
  void pack(int thread, int threads) const {
    const Range tasks = range_of(layer_.directions * panels(), thread, threads);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t d = task / panels(), p = task % panels();
      const Direction<S>& weights = layer_.direction[d];
      w_ih[d].pack(p);
      w_hh[d].pack(p);
      if (shape().late > 0) w_late[d].pack(p);
      T* const bias = bias_[d] + p * bias_size();
      std::memset(bias, 0, bias_size() * sizeof(T));
      const auto lay_out = [&](const T* from, int64_t count, T* to) {
        for (int64_t g = 0; from != nullptr && g < count; ++g)
          copy_row(from + g * layer_.hidden + p * units(), units_in(p), to + g * units());
      };
      lay_out(weights.b_ih, shape().gates, bias);
      lay_out(weights.b_hh, shape().recurrent, bias + input_width());
      lay_out(weights.unit, shape().parameters, bias + input_width() + recurrent_width());
    }
    const int64_t projection_panels = OfProjection::panels({}, layer_.projected);
    const Range of_projection = range_of(layer_.directions * projection_panels, thread, threads);
    for (int64_t task = of_projection.begin; task < of_projection.end; ++task)
      w_hr[task / projection_panels].pack(task % projection_panels);
  }

  // The biases of panel p, those of the input's and of the recurrent parts, and a registered cell's parameters:
  // [G + R + U, units].
  const T* bias(int64_t d, int64_t p) const { return bias_[d] + p * bias_size(); }

  // to[count, input_width] = panel p of the input's parts of the gates, for rows of x. `next`: as in multiply.
  void input(int64_t d, int64_t p, int64_t next, int64_t count, const S* x, T* to) const {
    if (layer_.multiplies_input) return w_ih[d].multiply(count, x, p, next, to);
    const int64_t H = layer_.hidden, gates = shape().gates;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t g = 0; g < gates; ++g)
        copy_row(x + i * layer_.input + (d * gates + g) * H + p * units(), units_in(p),
                 to + i * input_width() + g * units());
  }

  // Writes a row of panel p of a product to its row of all gates, [G, H].
  void unpack(const T* panel, int64_t p, T* row) const {
    const int64_t gates = shape().gates;
#pragma GCC unroll 4
    for (int64_t g = 0; g < gates; ++g)
      copy_row(panel + g * units(), units_in(p), row + g * layer_.hidden + p * units());
  }

  // The states of the units from u on before a step: from h, which is read only if the cell reads it, and from the other
  // states [others, H].
  template <class Count>
  static RNNKIT_INLINE void load_states(const S* h, const T* others, int64_t H, int64_t u, Count lanes, V* state) {
    state[0] = Cell::uses_previous_h ? load(h + u, lanes) : V{};
#pragma GCC unroll 8
    for (int64_t k = 0; k < Cell::states - 1; ++k) state[k + 1] = load(others + k * H + u, lanes);
  }

  // The cell's forward for the units from u on of a panel. `input`, `recurrent`: a row of w_ih's and of w_hh's product;
  // `state`: on entry before the step, on return after it; `save`: on return what Cell::saved counts.
  template <class Count>
  static RNNKIT_INLINE void cell(const T* input, const T* recurrent, const T* bias, int64_t u, Count lanes, V* state,
                                 V* save) {
    constexpr int64_t units = Cell::units, width = Cell::gates * units;
    V x[Cell::gates], h[Cell::gates];
#pragma GCC unroll 4
    for (int64_t g = 0; g < Cell::gates; ++g) {
      x[g] = load(input + g * units + u, lanes) + load(bias + g * units + u);
      h[g] = load(recurrent + g * units + u, lanes) + load(bias + width + g * units + u);
    }
    Cell::forward(x, h, state, save);
  }

  // Calls a function of a registered cell, forward or operand, for some rows of panel p. input, recurrent: `count` rows of
  // the products. h, others, states, saved: as in ForwardBlock, from the panel's first unit on.
  void call(void (*function)(const void*, const ForwardBlock<T>&), int64_t d, int64_t p, int64_t count,
            Block<const T> input, Block<const T> recurrent, Block<const T> h, Block<const T> others, Block<T> states,
            Block<T> saved) const {
    const T *x_bias = bias(d, p), *h_bias = x_bias + input_width(), *parameters = h_bias + recurrent_width();
    function(layer_.cell->context, {.rows = count,
                                    .units = units_in(p),
                                    .x = input,
                                    .h = recurrent,
                                    .x_bias = {x_bias, 0, units()},
                                    .h_bias = {h_bias, 0, units()},
                                    .parameters = {parameters, 0, units()},
                                    .previous_h = h,
                                    .other_states = others,
                                    .states = states,
                                    .saved = saved});
  }
  const Pointwise<T>& pointwise() const { return layer_.cell->template pointwise<T>(); }

  // Stores what a cell saves of some units to [Cell::saved, H].
  template <class Count>
  static RNNKIT_INLINE void store_saved(const V* save, int64_t H, Count lanes, T* to) {
#pragma GCC unroll 8
    for (int64_t k = 0; k < Cell::saved; ++k) store(to + k * H, save[k], lanes);
  }

 private:
  const auto& shape() const { return shape_of<Cell>(layer_); }
  auto panel(int64_t gates) const {
    if constexpr (kIsRegistered<Cell>)
      return AnyPanel{gates, shape().units};
    else
      return FixedPanel<Cell::gates, Cell::units>{};
  }
  int64_t bias_size() const { return input_width() + recurrent_width() + shape().parameters * units(); }

  const Layer<S>& layer_;
  PerDirection<T*> bias_;  // [panels, G + R + U, units]
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
