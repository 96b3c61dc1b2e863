// A weight matrix as products read it: packed into panels, or unpacked, which is row-major in the module's parameter.
// The format of a panel [K, width] follows from the element type (gemm.h, MatrixB): rows of float or double, or pairs
// of rows of bfloat16. A further type that both factors of a product have needs an Operand and a PanelFormat, and
// nothing else here changes. Weights of another type than the rows that they multiply would change Operand itself.
#pragma once

#include "cpu/gemm.h"
#include "cpu/partition.h"

namespace rnnkit::RNNKIT_CAPABILITY {

enum class PanelFormat : int64_t { float_panels = 1, double_panels, bfloat16_pairs };

template <class S>
constexpr PanelFormat kFormat = std::is_same_v<S, float>    ? PanelFormat::float_panels
                                : std::is_same_v<S, double> ? PanelFormat::double_panels
                                                            : PanelFormat::bfloat16_pairs;

constexpr int64_t kPanel = 64;  // columns of a panel that is not made of gates

// Whether a matrix is read often enough to be packed first: `times` by a product of `rows` rows.
inline bool is_worth_packing(int64_t rows, int64_t times = 1) {
  constexpr int64_t few = 16;  // readings
  return times * ((rows + kDotRows - 1) / kDotRows) > few;
}

// A panel of a product: `units` hidden units, each with a column for every gate.
template <int64_t kGates, int64_t kUnits>
struct FixedPanel {
  static constexpr int64_t gates = kGates, units = kUnits;
};
struct AnyPanel {
  int64_t gates, units;
};

// W [gates * units, K], for products a Wᵀ. A panel of the product holds some units with all their gates, so that a cell
// can work on it: column g * panel.units + u of panel p is row g * units + p * panel.units + u of W.
template <class S, class Panel>
class TransposedMatrix {
 public:
  // `packed`: memory for the packed W, of packed_size elements; null: W stays unpacked.
  TransposedMatrix() = default;
  TransposedMatrix(Panel of, const S* w, int64_t units, int64_t K, S* packed)
      : of_(of), w_(w), units_(units), K_(K), packed_(packed) {}

  static int64_t panels(Panel of, int64_t units) { return (units + of.units - 1) / of.units; }
  static int64_t packed_size(Panel of, int64_t units, int64_t K) {
    return panels(of, units) * K * (of.gates * of.units);
  }

  int64_t width() const { return of_.gates * of_.units; }
  int64_t units_in(int64_t p) const { return min_of(of_.units, units_ - p * of_.units); }

  // Packs panel p. Columns beyond the units are 0.
  void pack(int64_t p) const {
    if (packed_ == nullptr) return;
    if (units_in(p) < of_.units) std::memset(panel(p), 0, K_ * width() * sizeof(S));
    for (int64_t g = 0; g < of_.gates; ++g)
      pack_transposed(units_in(p), K_, rows_of_gate(g, p), K_, panel(p), width(), g * of_.units);
  }

  // to[M, width] = panel p of a Wᵀ, for a [M, K]; columns beyond the units are 0 or not written. `next`: the panel that
  // is multiplied after this one, which is prefetched; p itself: none. `ldto`: elements from row to row of `to`.
  void multiply(int64_t M, const S* a, int64_t p, int64_t next, Sum<S>* to, int64_t ldto) const {
    if (packed_ == nullptr) {
      for (int64_t g = 0; g < of_.gates; ++g)
        dot(M, units_in(p), K_, a, K_, rows_of_gate(g, p), K_, to + g * of_.units, ldto);
      return;
    }
    gemm<S>(M, width(), K_, rows_of(a, K_), MatrixB<S>::packed(panel(p), K_, width()), to, ldto, false,
            next != p ? panel(next) : nullptr);
  }
  void multiply(int64_t M, const S* a, int64_t p, int64_t next, Sum<S>* to) const {
    multiply(M, a, p, next, to, width());
  }

  // Whether panel p has neither NaN nor infinity, so that its product with zeros is zeros.
  bool is_finite(int64_t p) const {
    if (packed_ != nullptr) return all_finite(panel(p), K_ * width());
    for (int64_t g = 0; g < of_.gates; ++g)
      if (!all_finite(rows_of_gate(g, p), units_in(p) * K_)) return false;
    return true;
  }

 private:
  S* panel(int64_t p) const { return packed_ + p * K_ * width(); }
  const S* rows_of_gate(int64_t g, int64_t p) const { return w_ + (g * units_ + p * of_.units) * K_; }

  [[no_unique_address]] Panel of_;
  const S* w_ = nullptr;
  int64_t units_ = 0, K_ = 0;
  S* packed_ = nullptr;  // [panels, K, width]
};

// W [K, columns], for products a W, in panels of kPanel columns.
template <class S>
class Matrix {
 public:
  // `packed`: memory for the packed W, of packed_size elements; null: W stays unpacked.
  Matrix() = default;
  Matrix(const S* w, int64_t K, int64_t columns, S* packed) : w_(w), K_(K), columns_(columns), packed_(packed) {}

  static int64_t packed_size(int64_t K, int64_t columns) {
    return round_up(K, Operand<S>::pair) * round_up(columns, kPanel);
  }
  // Whether W cannot be read unpacked: its type is multiplied in pairs of rows, or a vector load would run past the end
  // of a row.
  static bool must_pack(int64_t columns) { return Operand<S>::pair > 1 || columns % kLanes<S> != 0; }

  // Packs this thread's part of the panels.
  void pack(int thread, int threads) const {
    if (packed_ == nullptr) return;
    const int64_t width = round_up(columns_, kPanel);
    const Range panels = range_of(width / kPanel, thread, threads);
    for (int64_t p = panels.begin; p < panels.end; ++p)
      pack_rows<S>(
          K_, min_of(kPanel, columns_ - p * kPanel), [&](int64_t k) { return w_ + k * columns_ + p * kPanel; }, packed_,
          width, p * kPanel);
  }

  // c[M, N] (+)= a[M, K] B, where B is the part of W from row k and column n on. `ahead`: as in gemm.
  void multiply(int64_t M, int64_t N, int64_t K, MatrixA<S> a, int64_t k, int64_t n, Sum<S>* c, int64_t ldc, bool add,
                const S* ahead = nullptr) const {
    gemm<S>(M, N, K, a, from(k, n), c, ldc, add, ahead);
  }

  // What a product is to prefetch if one with the part from row k and column n on comes next. Null: not packed.
  const S* ahead(int64_t k, int64_t n) const { return packed_ == nullptr ? nullptr : from(k, n).column(0).b; }

 private:
  MatrixB<S> from(int64_t k, int64_t n) const {
    if (packed_ == nullptr) return MatrixB<S>::row_major(w_, columns_).from(k, n);
    return MatrixB<S>::packed(packed_, K_, round_up(columns_, kPanel)).from(k, n);
  }

  const S* w_ = nullptr;
  int64_t K_ = 0, columns_ = 0;
  S* packed_ = nullptr;  // [panels, K, kPanel]
};

}  // namespace rnnkit::RNNKIT_CAPABILITY
