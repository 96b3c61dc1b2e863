// The host build of the GPU's kernels, for tests: the launches of kernels.h as loops. Built with register.cpp and
// RNNKIT_HOST into a library whose ops take CPU tensors (tests/host_build.py).
#include "cuda/instances.h"
#include "cuda/layer_norm.h"

namespace rnnkit::cuda {

template const std::vector<Persistent>& persistent_kernels<BFloat16, false>();
template const std::vector<Persistent>& persistent_kernels<BFloat16, true>();
template const std::vector<Persistent>& persistent_kernels<Half, false>();
template const std::vector<Persistent>& persistent_kernels<Half, true>();
template const std::vector<Persistent>& persistent_kernels<float, false>();
template const std::vector<Persistent>& persistent_kernels<float, true>();

std::string launch_persistent(const Persistent& kernel, const PersistentScan& scan, Stream) {
  reinterpret_cast<void (*)(const PersistentScan&)>(const_cast<void*>(kernel.function))(scan);
  return "";
}

namespace {

// The host as a team that has a row, see layer_norm.h.
struct HostTeam {
  template <class Body>
  void each(int64_t count, const Body& body) const {
    for (int64_t i = 0; i < count; ++i) body(i);
  }
  template <class Body>
  auto sums(int64_t count, const Body& body) const {
    decltype(body(0)) sum{0, 0};
    each(count, [&](int64_t i) {
      const auto of = body(i);
      sum = {sum.first + of.first, sum.second + of.second};
    });
    return sum;
  }
};

// Calls row(step, n) for all rows if they are normalized, else element(step, n, unit).
template <class Element, class Row>
void each_row(const Steps& steps, const Element& element, const Row& row) {
  for (int d = 0; d < steps.directions; ++d)
    for (int64_t n = 0; n < steps.of[d].rows; ++n) {
      const Step& step = steps.of[d];
      if (step.norms.hh != nullptr)
        row(step, n);
      else
        for (int64_t unit = 0; unit < step.hidden; ++unit) element(step, n, unit);
    }
}

template <class Cell, class S>
void run_step(bool backward, const Steps& steps) {
  const HostTeam team;
  each_row(
      steps,
      [&](const Step& step, int64_t n, int64_t unit) {
        backward ? backward_element<Cell, S>(step, n, unit) : forward_element<Cell, S>(step, n, unit, Plain<Cell, S>());
      },
      [&](const Step& step, int64_t n) {
        backward ? backward_row<Cell, S>(step, n, team) : forward_row<Cell, S>(step, n, team);
      });
}

template <class Cell, class S>
void run_unprojected(const Steps& steps) {
  each_row(
      steps,
      [&](const Step& step, int64_t n, int64_t unit) { unprojected_element<Cell, S>(step, n, unit, Plain<Cell, S>()); },
      [&](const Step& step, int64_t n) { unprojected_row<Cell, S>(step, n, HostTeam()); });
}

}  // namespace

std::string launch_step(std::string_view cell, Type type, bool backward, const Steps& steps, Stream) {
  with_type(type, [&](auto element) {
#define RNNKIT_LAUNCH(Cell, name) \
  if (cell == name) run_step<Cell, decltype(element)>(backward, steps);
    RNNKIT_CELLS(RNNKIT_LAUNCH)
#undef RNNKIT_LAUNCH
  });
  return "";
}

std::string launch_unprojected(std::string_view cell, Type type, const Steps& steps, Stream) {
  with_type(type, [&](auto element) {
#define RNNKIT_LAUNCH(Cell, name) \
  if (cell == name) run_unprojected<Cell, decltype(element)>(steps);
    RNNKIT_CELLS(RNNKIT_LAUNCH)
#undef RNNKIT_LAUNCH
  });
  return "";
}

std::string multiply(const Product& product, void*) {
  const Matrices &a = product.a, &b = product.b, &c = product.c;
  with_type(product.type, [&](auto element) {
    using S = decltype(element);
    for (int n = 0; n < product.count; ++n)
      for (int64_t row = 0; row < product.rows; ++row)
        for (int64_t column = 0; column < product.columns; ++column) {
          Sum<S> sum = 0;
          for (int64_t k = 0; k < product.depth; ++k) {
            const int64_t at = product.transposed ? column * b.stride + k : k * b.stride + column;
            sum += read<S>(a.data, n * a.next + row * a.stride + k) * read<S>(b.data, n * b.next + at);
          }
          write<S>(c.data, n * c.next + row * c.stride + column, sum);
        }
  });
  return "";
}

std::string launch_add(Type type, const Addition& addition, Stream) {
  with_type(type, [&](auto element) {
    for (int64_t n = 0; n < addition.rows; ++n)
      for (int64_t column = 0; column < addition.width; ++column) add_element<decltype(element)>(addition, n, column);
  });
  return "";
}

std::string launch_put_back(Type type, const PutBack& put_back, Stream) {
  with_type(type, [&](auto element) {
    for (int64_t n = 0; n < put_back.rows; ++n)
      for (int64_t column = 0; column < put_back.width; ++column)
        put_back_element<decltype(element)>(put_back, n, column);
  });
  return "";
}

}  // namespace rnnkit::cuda
