// The one micro-kernel under every matrix product, and the packing of its operands.
//
// Each element of C is summed over k in order, one fused multiply-add at a time, in blocks of kDepthOfBlock whose sums
// are added in order. How rows and columns are tiled does not change this order: the bits are the same however they are
// divided among threads. bfloat16 is multiplied two k at a time, which stand side by side: an operand [K, N] is packed
// as [K/2, N, 2].
#pragma once

#include <utility>

#include "common/lanes.h"
#include "cpu/partition.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace rnnkit::RNNKIT_CAPABILITY {

// How operands of type S are multiplied: `pair` consecutive k at once, `lanes` columns in a vector.
template <class S>
struct Operand {
  using Values = Vector<S>;
  static constexpr int64_t pair = 1, lanes = kLanes<S>;

  static RNNKIT_INLINE Values splat_pair(const S* from) { return splat(*from); }
  static RNNKIT_INLINE Values load_pairs(const S* from) { return load(from); }
  static RNNKIT_INLINE Values load_pairs(const S* from, int64_t count) { return load(from, count); }
  static RNNKIT_INLINE Vector<S> multiply_add(Values a, Values b, Vector<S> sum) { return a * b + sum; }
  static RNNKIT_INLINE Vector<S> sum_pairs(Values values) { return values; }
};

#if defined(__AVX512BF16__)
template <>
struct Operand<BFloat16> {
  typedef uint32_t Values __attribute__((vector_size(kVectorBytes)));  // of pairs, the earlier k in the lower half
  static constexpr int64_t pair = 2, lanes = kLanes<float>;

  static RNNKIT_INLINE Values splat_pair(const BFloat16* from) {
    uint32_t both;
    std::memcpy(&both, from, sizeof both);
    return Values{} + both;
  }
  static RNNKIT_INLINE Values load_pairs(const BFloat16* from) {
    Values values;
    std::memcpy(&values, from, sizeof values);
    return values;
  }
  static RNNKIT_INLINE Values load_pairs(const BFloat16* from, int64_t count) {
    if (count >= 2 * lanes) return load_pairs(from);
    Values values{};
    std::memcpy(&values, from, count * sizeof(BFloat16));
    return values;
  }
  static RNNKIT_INLINE Vector<float> multiply_add(Values a, Values b, Vector<float> sum) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static RNNKIT_INLINE Vector<float> sum_pairs(Values values) {
    return (Vector<float>)(values << 16) + (Vector<float>)(values & 0xffff0000u);
  }
};
#endif

// Operand A, row-major or transposed. Pair q of k in row m is at a[m * row() + q * column()]. kTransposed is a template
// parameter so that one of the two is a constant in the innermost loop.
template <class S, bool kTransposed = false>
struct MatrixA {
  const S* a;
  int64_t stride;  // from row to row, or, transposed, from pair to pair

  int64_t row() const { return kTransposed ? Operand<S>::pair : stride; }
  int64_t column() const { return kTransposed ? stride : Operand<S>::pair; }
  MatrixA from(int64_t m, int64_t q) const { return {a + m * row() + q * column(), stride}; }
};

// Row-major A; `lda`: from row to row.
template <class S>
MatrixA<S> rows_of(const S* a, int64_t lda) {
  return {a, lda};
}

// A tile of C stays in registers: kVectorsInTile vectors of columns, rows_in_tile rows. Without AVX-512, kDepthOfBlock
// rows of a strip of B are 16 KiB, half of a small L1.
#if defined(__AVX512F__)
constexpr int kVectorsInTile = 4;
constexpr int64_t kDepthOfBlock = 512;
constexpr int rows_in_tile(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 12; }
#elif defined(__AVX2__)
constexpr int kVectorsInTile = 2;
constexpr int64_t kDepthOfBlock = 256;
constexpr int rows_in_tile(int vectors) { return vectors == 2 ? 6 : 8; }
#else
constexpr int kVectorsInTile = 2;
constexpr int64_t kDepthOfBlock = 512;
constexpr int rows_in_tile(int vectors) { return vectors == 2 ? 4 : 6; }
#endif

// Products of so few rows multiply several strips at once: the sums of one strip are too few to hide the latency of a
// multiply-add.
constexpr int64_t kFewRows = kVectorsInTile == 2 ? 2 : 0;

// The vectors of sums in a tile when `rows` rows are multiplied. They are independent of each other.
constexpr int64_t sums_at_once(int64_t rows) {
  return rows <= kFewRows ? 8 : kVectorsInTile * min_of(rows, rows_in_tile(kVectorsInTile));
}

// Columns of B that one tile multiplies.
template <class S>
constexpr int64_t kStrip = kVectorsInTile * Operand<S>::lanes;

// Operand B [K, N]: packed into strips of kStrip columns, the last one perhaps narrower, each row-major by itself so
// that a tile reads consecutive memory; or row-major as a whole.
template <class S>
class MatrixB {
 public:
  // [depth, width], as pack_rows or pack_transposed left it.
  static MatrixB packed(const S* b, int64_t depth, int64_t width) { return {b, 0, depth, width}; }
  // Row-major; `row`: elements from row to row. A row is read up to the next multiple of the lanes.
  static MatrixB row_major(const S* b, int64_t row) { return {b, row, 0, 0}; }

  // The part from row k and column n on.
  MatrixB from(int64_t k, int64_t n) const { return {b_, row_, depth_, width_, k_ + k, n_ + n}; }

  // Column n of row 0, and the distance to it in the next pair of rows.
  struct Column {
    const S* b;
    int64_t row;
  };
  Column column(int64_t n) const {
    constexpr int64_t pair = Operand<S>::pair;
    n += n_;
    if (row_ > 0) return {b_ + k_ * row_ + n * pair, row_ * pair};
    const int64_t first = n / kStrip<S> * kStrip<S>;
    const int64_t columns = min_of(kStrip<S>, width_ - first);
    return {b_ + first * depth_ + k_ * columns + (n - first) * pair, columns * pair};
  }
  // Columns from n to the end of its strip.
  int64_t left_in_strip(int64_t n) const { return kStrip<S> - (row_ > 0 ? 0 : (n_ + n) % kStrip<S>); }
  // How many whole strips the columns from n on have; 0 if B is not packed.
  int64_t whole_strips(int64_t n, int64_t columns) const {
    return row_ > 0 || (n_ + n) % kStrip<S> != 0 ? 0 : columns / kStrip<S>;
  }

 private:
  MatrixB(const S* b, int64_t row, int64_t depth, int64_t width, int64_t k = 0, int64_t n = 0)
      : b_(b), row_(row), depth_(depth), width_(width), k_(k), n_(n) {}

  const S* b_;
  int64_t row_, depth_, width_, k_, n_;
};

// Memory that a product prefetches into L2 while it multiplies: from `from` on, `stride` bytes for each pair of k.
// Null: none.
struct Prefetch {
  const char* from;
  int64_t stride;
};

// C[kRows, kVectors * lanes] (+)= A B, with all of C in registers. kLines: cache lines prefetched for each pair of k.
// Vectors beyond kVectorsInTile belong to the next strips of B, `strip_stride` elements apart.
template <class S, int kRows, int kVectors, int kLines, bool kTransposed>
RNNKIT_INLINE void tile(int64_t K, MatrixA<S, kTransposed> A, const S* b, int64_t ldb, Sum<S>* c, int64_t ldc, bool add,
                        Prefetch ahead, int64_t strip_stride = 0) {
  using Op = Operand<S>;
  Vector<Sum<S>> sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[m][v] = Vector<Sum<S>>{};
  for (int64_t q = 0; q < K / Op::pair; ++q) {
#pragma GCC unroll 8
    for (int line = 0; line < kLines; ++line) __builtin_prefetch(ahead.from + q * ahead.stride + line * 64, 0, 2);
    typename Op::Values columns[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      columns[v] =
          Op::load_pairs(b + v / kVectorsInTile * strip_stride + q * ldb + v % kVectorsInTile * Op::lanes * Op::pair);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const typename Op::Values a = Op::splat_pair(A.a + m * A.row() + q * A.column());
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[m][v] = Op::multiply_add(a, columns[v], sums[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Sum<S>* to = c + m * ldc + v * Op::lanes;
      store(to, add ? load(to) + sums[m][v] : sums[m][v]);
    }
}

template <class S, int kVectors, int kLines = 0, int kRows = rows_in_tile(kVectors), bool kTransposed>
inline void tile_of(int64_t rows, int64_t K, MatrixA<S, kTransposed> A, const S* b, int64_t ldb, Sum<S>* c, int64_t ldc,
                    bool add, Prefetch ahead = {}) {
  if (rows == kRows)
    tile<S, kRows, kVectors, kLines>(K, A, b, ldb, c, ldc, add, ahead);
  else if constexpr (kRows > 1)
    tile_of<S, kVectors, kLines, kRows - 1>(rows, K, A, b, ldb, c, ldc, add, ahead);
}

// C[M, kVectors * lanes] (+)= A B in tiles of nearly equal height; a block of k is done for all tiles before the next
// one. `ahead`: memory as large as B that the first tiles prefetch, so that B comes from L3 once and then from L2.
template <class S, int kVectors, bool kTransposed>
void strip(int64_t M, int64_t K, MatrixA<S, kTransposed> A, typename MatrixB<S>::Column B, Sum<S>* c, int64_t ldc,
           bool add, const S* ahead = nullptr) {
  constexpr int64_t max_rows = rows_in_tile(kVectors), bytes = kVectors * kVectorBytes, spread = 4;
  constexpr int lines = bytes <= 128 ? 1 : bytes / 128;
  const int64_t tiles = (M + max_rows - 1) / max_rows, fetching = min_of(tiles, spread);
  for (int64_t k = 0; k < K; k += kDepthOfBlock) {
    const int64_t depth = min_of(K - k, kDepthOfBlock), q = k / Operand<S>::pair;
    const S* b = B.b + q * B.row;
    for (int64_t i = 0, m = 0; i < tiles; ++i) {
      const int64_t rows = (M - m) / (tiles - i);
      const MatrixA<S, kTransposed> own = A.from(m, q);
      if (kTransposed && add && k == 0)  // C of a sum over many rows is not in L1
        for (int64_t row = m; row < m + rows; ++row)
          for (int64_t at = 0; at < bytes; at += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(c + row * ldc) + at, 1);
      if (ahead != nullptr && i < fetching) {
        const int64_t stride = bytes / fetching;
        const char* from = reinterpret_cast<const char*>(ahead) + q * bytes + i * (depth / Operand<S>::pair) * stride;
        tile_of<S, kVectors, lines>(rows, depth, own, b, B.row, c + m * ldc, ldc, add || k > 0, {from, stride});
      } else {
        tile_of<S, kVectors>(rows, depth, own, b, B.row, c + m * ldc, ldc, add || k > 0);
      }
      m += rows;
    }
  }
}

// C[kRows, kStrips strips] (+)= A B for few rows (kFewRows). `strip_stride`: elements from strip to strip.
template <class S, int kRows, int kStrips>
void few_rows(int64_t K, MatrixA<S> A, typename MatrixB<S>::Column B, int64_t strip_stride, Sum<S>* c, int64_t ldc,
              bool add) {
  for (int64_t k = 0; k < K; k += kDepthOfBlock) {
    const int64_t depth = min_of(K - k, kDepthOfBlock), q = k / Operand<S>::pair;
    tile<S, kRows, kStrips * kVectorsInTile, 0>(depth, A.from(0, q), B.b + q * B.row, B.row, c, ldc, add || k > 0, {},
                                                strip_stride);
  }
}

// C[M, columns] (+)= A B for fewer columns than lanes.
template <class S, bool kTransposed>
void edge(int64_t M, int64_t columns, int64_t K, MatrixA<S, kTransposed> A, typename MatrixB<S>::Column B, Sum<S>* c,
          int64_t ldc, bool add) {
  constexpr int64_t lanes = Operand<S>::lanes, block = 16;
  alignas(64) Sum<S> whole[block * lanes];
  for (int64_t m = 0; m < M; m += block) {
    const int64_t rows = min_of(M - m, block);
    for (int64_t i = 0; add && i < rows; ++i) store(whole + i * lanes, load(c + (m + i) * ldc, columns));
    strip<S, 1>(rows, K, A.from(m, 0), B, whole, lanes, add);
    for (int64_t i = 0; i < rows; ++i) store(c + (m + i) * ldc, load(whole + i * lanes), columns);
  }
}

// C[M, N] (+)= A[M, K] B[K, N]. K is a multiple of Operand<S>::pair. Nothing is written beside the N columns of C.
// `ahead`: packed memory that is multiplied next. As much of it is prefetched as is read of B; few_rows and edge
// prefetch nothing. Null: none.
template <class S, bool kTransposed>
void gemm(int64_t M, int64_t N, int64_t K, MatrixA<S, kTransposed> A, MatrixB<S> B, Sum<S>* c, int64_t ldc, bool add,
          const S* ahead = nullptr) {
  constexpr int64_t lanes = Operand<S>::lanes;
  if (M == 0) return;
  for (int64_t n = 0; n < N;) {
    const int64_t in_strip = B.left_in_strip(n), columns = min_of(N - n, in_strip);
    const auto b = B.column(n);
    if constexpr (kFewRows > 0 && !kTransposed) {
      const int64_t strips = M <= kFewRows ? B.whole_strips(n, N - n) : 0;
      if (strips > 1) {
        const int64_t distance = B.column(n + kStrip<S>).b - b.b;
        const int64_t taken = M == 2 ? 2 : min_of(strips, 4);
        if (M == 2)
          few_rows<S, 2, 2>(K, A, b, distance, c + n, ldc, add);
        else if (taken == 2)
          few_rows<S, 1, 2>(K, A, b, distance, c + n, ldc, add);
        else if (taken == 3)
          few_rows<S, 1, 3>(K, A, b, distance, c + n, ldc, add);
        else
          few_rows<S, 1, 4>(K, A, b, distance, c + n, ldc, add);
        n += taken * kStrip<S>;
        continue;
      }
    }
    const S* next = ahead == nullptr ? nullptr : n + columns < N ? B.column(n + columns).b : ahead;
    if (columns >= 4 * lanes && kVectorsInTile == 4) {
      if constexpr (kVectorsInTile == 4) strip<S, 4>(M, K, A, b, c + n, ldc, add, next);
      n += 4 * lanes;
    } else if (columns >= 3 * lanes) {
      if constexpr (kVectorsInTile == 4) strip<S, 3>(M, K, A, b, c + n, ldc, add, next);
      n += 3 * lanes;
    } else if (columns >= 2 * lanes) {
      strip<S, 2>(M, K, A, b, c + n, ldc, add, next);
      n += 2 * lanes;
    } else if (columns >= lanes) {
      strip<S, 1>(M, K, A, b, c + n, ldc, add, next);
      n += lanes;
    } else {
      edge(M, columns, K, A, b, c + n, ldc, add);
      n += columns;
    }
  }
}

// One stage of a transposition: swaps the lanes of `a` whose number has the bit kStride with the lanes of `b` whose
// number has not.
template <class T, size_t kStride, size_t... kLane>
RNNKIT_INLINE void exchange(Vector<T>& a, Vector<T>& b, std::index_sequence<kLane...>) {
  constexpr size_t lanes = kLanes<T>;
#if defined(__clang__)
  const Vector<T> low = __builtin_shufflevector(a, b, (kLane & kStride ? kLane - kStride + lanes : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kStride ? kLane + lanes : kLane + kStride)...);
#else
  typedef typename Format<T>::Bits Places __attribute__((vector_size(kVectorBytes)));
  const Vector<T> low = __builtin_shuffle(a, b, Places{(kLane & kStride ? kLane - kStride + lanes : kLane)...});
  b = __builtin_shuffle(a, b, Places{(kLane & kStride ? kLane + lanes : kLane + kStride)...});
#endif
  a = low;
}

template <class T, size_t kStride = kLanes<T> / 2>
RNNKIT_INLINE void transpose(Vector<T>* rows) {
#pragma GCC unroll 16
  for (size_t i = 0; i < kLanes<T>; ++i)
    if (!(i & kStride)) exchange<T, kStride>(rows[i], rows[i + kStride], std::make_index_sequence<kLanes<T>>());
  if constexpr (kStride > 1) transpose<T, kStride / 2>(rows);
}

// Lane i of the result is the sum of the lanes of rows[i], for as many rows as a vector has lanes. The rows are
// overwritten.
template <class T>
RNNKIT_INLINE Vector<T> sum_each(Vector<T>* rows) {
  transpose<T>(rows);
#pragma GCC unroll 4
  for (int64_t width = kLanes<T> / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int64_t i = 0; i < width; ++i) rows[i] += rows[i + width];
  return rows[0];
}

// C[kM, rows] (+)= A[kM, K] Wᵀ, with W [rows, K] unpacked. C(m, j) is c[m * ldc + j]. A dot product is summed over k in
// lanes, then over the lanes.
template <class S, int kM>
void dot_rows(int64_t rows, int64_t K, const S* a, int64_t lda, const S* w, int64_t ldw, Sum<S>* c, int64_t ldc,
              bool add) {
  using Op = Operand<S>;
  using T = Sum<S>;
  constexpr int kAtOnce = kLanes<T> / kM > 0 ? kLanes<T> / kM : 1;
  constexpr int kBlock = (kM * kAtOnce + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  constexpr int64_t stretch = Op::lanes * Op::pair;
  for (int64_t j = 0; j < rows; j += kAtOnce) {
    const int64_t here = min_of(rows - j, kAtOnce);
    const S* row[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i) row[i] = w + (j + (i < here ? i : 0)) * ldw;
    Vector<T> sums[kBlock] = {};  // of rows m and j + i in [m * kAtOnce + i]
    int64_t k = 0;
    for (; k + stretch <= K; k += stretch) {
      typename Op::Values x[kM];
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) x[m] = Op::load_pairs(a + m * lda + k);
#pragma GCC unroll 16
      for (int i = 0; i < kAtOnce; ++i) {
        const typename Op::Values weights = Op::load_pairs(row[i] + k);
#pragma GCC unroll 4
        for (int m = 0; m < kM; ++m) sums[m * kAtOnce + i] = Op::multiply_add(x[m], weights, sums[m * kAtOnce + i]);
      }
    }
    if (k < K)
      for (int i = 0; i < kAtOnce; ++i)
        for (int m = 0; m < kM; ++m)
          sums[m * kAtOnce + i] = Op::multiply_add(Op::load_pairs(a + m * lda + k, K - k),
                                                   Op::load_pairs(row[i] + k, K - k), sums[m * kAtOnce + i]);
    T totals[kBlock];
    for (int first = 0; first < kBlock; first += kLanes<T>) store(totals + first, sum_each<T>(sums + first));
    for (int m = 0; m < kM; ++m)
      for (int i = 0; i < here; ++i)
        c[m * ldc + j + i] = add ? c[m * ldc + j + i] + totals[m * kAtOnce + i] : totals[m * kAtOnce + i];
  }
}

// Whether none of `count` values is NaN or infinite. Times 0, both give NaN.
template <class S>
bool all_finite(const S* from, int64_t count) {
  using Op = Operand<S>;
  constexpr int64_t stretch = Op::lanes * Op::pair;
  Vector<Sum<S>> sums[4] = {};
  const typename Op::Values zero{};
  int64_t i = 0;
  for (; i + 4 * stretch <= count; i += 4 * stretch)
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) sums[j] = Op::multiply_add(Op::load_pairs(from + i + j * stretch), zero, sums[j]);
  for (; i < count; i += stretch) sums[0] = Op::multiply_add(Op::load_pairs(from + i, count - i), zero, sums[0]);
  Sum<S> lanes[kLanes<Sum<S>>];
  store(lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (const Sum<S> lane : lanes)
    if (lane != 0) return false;
  return true;
}

constexpr int64_t kDotRows = 4;  // rows of A for which W is read once

// C[M, rows] = A[M, K] Wᵀ for few rows of A, with W [rows, K] unpacked. Blocks of k are summed by themselves, since one
// long chain of sums would round too often.
template <class S>
void dot(int64_t M, int64_t rows, int64_t K, const S* a, int64_t lda, const S* w, int64_t ldw, Sum<S>* c, int64_t ldc) {
  constexpr int64_t block = 128 * Operand<S>::lanes * Operand<S>::pair;
  for (int64_t k = 0; k == 0 || k < K; k += block) {
    const int64_t depth = min_of(K - k, block);
    const bool add = k > 0;
    int64_t m = 0;
    for (; M - m >= kDotRows; m += kDotRows)
      dot_rows<S, kDotRows>(rows, depth, a + m * lda + k, lda, w + k, ldw, c + m * ldc, ldc, add);
    if (M - m == 3) dot_rows<S, 3>(rows, depth, a + m * lda + k, lda, w + k, ldw, c + m * ldc, ldc, add);
    if (M - m == 2) dot_rows<S, 2>(rows, depth, a + m * lda + k, lda, w + k, ldw, c + m * ldc, ldc, add);
    if (M - m == 1) dot_rows<S, 1>(rows, depth, a + m * lda + k, lda, w + k, ldw, c + m * ldc, ldc, add);
  }
}

// Writes row j of w, which is w[j * ldw + k], to column n + j of the packed B [K, width] (MatrixB), for j < rows and k
// < K; and zeros to the columns after them up to the next multiple of the lanes. n is a multiple of the lanes.
template <class S>
void pack_transposed(int64_t rows, int64_t K, const S* w, int64_t ldw, S* packed, int64_t width, int64_t n) {
  if constexpr (Operand<S>::pair == 2) {  // a pair is as wide as a float, and moves as one
    pack_transposed(rows, K / 2, reinterpret_cast<const float*>(w), ldw / 2, reinterpret_cast<float*>(packed), width,
                    n);
  } else {
    constexpr int64_t lanes = kLanes<S>;
    for (int64_t j = 0; j < rows; j += lanes) {
      const int64_t first = (n + j) / kStrip<S> * kStrip<S>;
      const int64_t row = min_of(kStrip<S>, width - first);
      S* to = packed + first * K + (n + j - first);
      for (int64_t k = 0; k < K; k += lanes) {
        Vector<S> block[lanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i) block[i] = j + i < rows ? load(w + (j + i) * ldw + k, K - k) : Vector<S>{};
        transpose<S>(block);
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i)
          if (k + i < K) store(to + (k + i) * row, block[i]);
      }
    }
  }
}

#if defined(__AVX512BF16__)
// to[2 * j] = even[j], to[2 * j + 1] = odd[j], or 0 if odd is null.
inline void interleave(const BFloat16* even, const BFloat16* odd, int64_t count, BFloat16* to) {
  constexpr int64_t lanes = kLanes<float>;
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  using Pairs = Operand<BFloat16>::Values;
  for (int64_t j = 0; j < count; j += lanes) {
    const int64_t here = min_of(count - j, lanes);
    Halves low{}, high{};
    std::memcpy(&low, even + j, here * sizeof(BFloat16));
    if (odd != nullptr) std::memcpy(&high, odd + j, here * sizeof(BFloat16));
    const Pairs pairs = __builtin_convertvector(low, Pairs) | __builtin_convertvector(high, Pairs) << 16;
    std::memcpy(to + 2 * j, &pairs, 2 * here * sizeof(BFloat16));
  }
}
#endif

// to[k * width + j] = row(k)[j] for k < K and j < columns, in pairs of k for bfloat16. The rest of `to` becomes 0.
template <class S, class Row>
void copy_rows(int64_t K, int64_t columns, const Row& row, S* to, int64_t width) {
  for (int64_t k = 0; k < K; k += Operand<S>::pair, to += Operand<S>::pair * width) {
    if constexpr (Operand<S>::pair == 2) {
      const S* even = row(k);  // before row(k + 1): a row may be found from the one before
      interleave(even, k + 1 < K ? row(k + 1) : nullptr, columns, to);
    } else {
      const S* from = row(k);
      for (int64_t j = 0; j < columns; j += kLanes<S>) {
        const int64_t lanes = min_of(columns - j, kLanes<S>);
        store(to + j, load(from + j, lanes), lanes);
      }
    }
    if (columns < width)
      std::memset(to + columns * Operand<S>::pair, 0, (width - columns) * Operand<S>::pair * sizeof(S));
  }
}

// Writes row(k)[j] to column n + j of the packed B [K, width] (MatrixB), for k < K and j < columns; and zeros to the
// rest of the last strip. n is a multiple of kStrip.
template <class S, class Row>
void pack_rows(int64_t K, int64_t columns, const Row& row, S* packed, int64_t width, int64_t n) {
  const int64_t depth = (K + Operand<S>::pair - 1) / Operand<S>::pair * Operand<S>::pair;
  for (int64_t j = 0; j < columns; j += kStrip<S>, n += kStrip<S>) {
    const int64_t in_strip = min_of(kStrip<S>, width - n);
    copy_rows<S>(K, min_of(columns - j, in_strip), [&](int64_t k) { return row(k) + j; }, packed + n * depth, in_strip);
  }
}

}  // namespace rnnkit::RNNKIT_CAPABILITY
