// The one micro-kernel under every matrix product, and the packing of its operands.
//
// Each element of C is summed over k in order, one fused multiply-add at a time, however the rows and columns are
// tiled: the same bits for every split of them over threads. Operands of type bfloat16 are multiplied two k at a time,
// so that these lie side by side: an operand [K, N] is packed as [K/2, N, 2].
#pragma once

#include <utility>

#include "common/lanes.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace rnnkit::RNNKIT_CAPABILITY {

// How operands of type S are multiplied: `pair` neighbours in k at once. `lanes` columns make a vector.
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
  typedef uint32_t Values __attribute__((vector_size(kVectorBytes)));  // a pair each, the earlier k in the lower half
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

// Operand A: the pair of k that begins at pair * q in row m lies at a[m * row + q * column].
template <class S>
struct MatrixA {
  const S* a;
  int64_t row, column;
};

// A as it lies, row-major.
template <class S>
MatrixA<S> rows_of(const S* a, int64_t lda) {
  return {a, lda, Operand<S>::pair};
}

#if defined(__AVX512F__)
constexpr int kVectorsInTile = 4;
constexpr int rows_in_tile(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 12; }
#elif defined(__AVX2__)
constexpr int kVectorsInTile = 2;
constexpr int rows_in_tile(int vectors) { return vectors == 2 ? 6 : 8; }
#else
constexpr int kVectorsInTile = 2;
constexpr int rows_in_tile(int vectors) { return vectors == 2 ? 4 : 6; }
#endif

// C[kRows, kVectors * lanes] (+)= A B, all of C in registers. For each k, meanwhile, kFetch bytes from `ahead` on are
// fetched into L2.
template <class S, int kRows, int kVectors, int kFetch>
RNNKIT_INLINE void tile(int64_t K, MatrixA<S> A, const S* b, int64_t ldb, Sum<S>* c, int64_t ldc, bool add,
                        const char* ahead) {
  using Op = Operand<S>;
  Vector<Sum<S>> sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[m][v] = Vector<Sum<S>>{};
  for (int64_t q = 0; q < K / Op::pair; ++q) {
#pragma GCC unroll 4
    for (int line = 0; line < kFetch; line += 64) __builtin_prefetch(ahead + q * kFetch + line, 0, 2);
    typename Op::Values columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = Op::load_pairs(b + (q * ldb + v * Op::lanes) * Op::pair);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const typename Op::Values a = Op::splat_pair(A.a + m * A.row + q * A.column);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[m][v] = Op::multiply_add(a, columns[v], sums[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Sum<S>* to = c + m * ldc + v * Op::lanes;
      store(to, add ? load(to) + sums[m][v] : sums[m][v]);
    }
}

template <class S, int kVectors, int kFetch = 0, int kRows = rows_in_tile(kVectors)>
inline void tile_of(int64_t rows, int64_t K, MatrixA<S> A, const S* b, int64_t ldb, Sum<S>* c, int64_t ldc, bool add,
                    const char* ahead = nullptr) {
  if (rows == kRows)
    tile<S, kRows, kVectors, kFetch>(K, A, b, ldb, c, ldc, add, ahead);
  else if constexpr (kRows > 1)
    tile_of<S, kVectors, kFetch, kRows - 1>(rows, K, A, b, ldb, c, ldc, add, ahead);
}

// C[M, kVectors * lanes] (+)= A B, in tiles of nearly equal height. `ahead`: the B of a later product, equally large,
// which the first tiles fetch: B comes from L3 once, then from L2.
template <class S, int kVectors>
void strip(int64_t M, int64_t K, MatrixA<S> A, const S* b, int64_t ldb, Sum<S>* c, int64_t ldc, bool add,
           const S* ahead = nullptr) {
  constexpr int64_t most = rows_in_tile(kVectors);
  constexpr int fetch = kVectors < 3 ? 0 : kVectors * kVectorBytes / 2;
  const int64_t tiles = (M + most - 1) / most;
  for (int64_t i = 0, m = 0; i < tiles; ++i) {
    const int64_t rows = (M - m) / (tiles - i);
    const MatrixA<S> own = {A.a + m * A.row, A.row, A.column};
    if (fetch > 0 && ahead != nullptr && i < 2)
      tile_of<S, kVectors, fetch>(rows, K, own, b, ldb, c + m * ldc, ldc, add,
                                  reinterpret_cast<const char*>(ahead) + i * (K / Operand<S>::pair) * fetch);
    else
      tile_of<S, kVectors>(rows, K, own, b, ldb, c + m * ldc, ldc, add);
    m += rows;
  }
}

// C[M, N] (+)= A[M, K] B[K, N]; K is even where pairs are multiplied. B is row-major or, for pairs, [K/2, ldb, 2]; where
// N is not a multiple of the lanes, each of its rows must be readable up to the next multiple. C is written in its N
// columns only. `ahead`: see strip.
template <class S>
void gemm(int64_t M, int64_t N, int64_t K, MatrixA<S> A, const S* b, int64_t ldb, Sum<S>* c, int64_t ldc, bool add,
          const S* ahead = nullptr) {
  constexpr int64_t lanes = Operand<S>::lanes, pair = Operand<S>::pair;
  int64_t n = 0;
  for (; n + kVectorsInTile * lanes <= N; n += kVectorsInTile * lanes)
    strip<S, kVectorsInTile>(M, K, A, b + n * pair, ldb, c + n, ldc, add, ahead);
  if constexpr (kVectorsInTile == 4) {
    if (n + 3 * lanes <= N) {
      strip<S, 3>(M, K, A, b + n * pair, ldb, c + n, ldc, add, ahead);
      n += 3 * lanes;
    } else if (n + 2 * lanes <= N) {
      strip<S, 2>(M, K, A, b + n * pair, ldb, c + n, ldc, add);
      n += 2 * lanes;
    }
  }
  if (n + lanes <= N) {
    strip<S, 1>(M, K, A, b + n * pair, ldb, c + n, ldc, add);
    n += lanes;
  }
  if (n == N) return;
  constexpr int64_t block = 16;
  alignas(64) Sum<S> edge[block * lanes];
  for (int64_t m = 0; m < M; m += block) {
    const int64_t rows = M - m < block ? M - m : block;
    for (int64_t i = 0; add && i < rows; ++i) store(edge + i * lanes, load(c + (m + i) * ldc + n, N - n));
    strip<S, 1>(rows, K, {A.a + m * A.row, A.row, A.column}, b + n * pair, ldb, edge, lanes, add);
    for (int64_t i = 0; i < rows; ++i) store(c + (m + i) * ldc + n, load(edge + i * lanes), N - n);
  }
}

// Exchanges, between rows i and i + kStride of a square block, the lanes that are on the wrong side of its diagonal.
template <class T, size_t kStride, size_t... kLane>
RNNKIT_INLINE void exchange(Vector<T>& a, Vector<T>& b, std::index_sequence<kLane...>) {
  constexpr size_t lanes = kLanes<T>;
  const Vector<T> low = __builtin_shufflevector(a, b, (kLane & kStride ? kLane - kStride + lanes : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kStride ? kLane + lanes : kLane + kStride)...);
  a = low;
}

template <class T, size_t kStride = kLanes<T> / 2>
RNNKIT_INLINE void transpose(Vector<T>* rows) {
#pragma GCC unroll 16
  for (size_t i = 0; i < kLanes<T>; ++i)
    if (!(i & kStride)) exchange<T, kStride>(rows[i], rows[i + kStride], std::make_index_sequence<kLanes<T>>());
  if constexpr (kStride > 1) transpose<T, kStride / 2>(rows);
}

// The sum of each vector's lanes, `rows` being as many vectors as these have lanes.
template <class T>
RNNKIT_INLINE Vector<T> sum_each(Vector<T>* rows) {
  transpose<T>(rows);
#pragma GCC unroll 4
  for (int64_t width = kLanes<T> / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int64_t i = 0; i < width; ++i) rows[i] += rows[i + width];
  return rows[0];
}

// C[M, rows] = A[M, K] W^T for few rows of A, W [rows, K] as it lies: nothing is packed. C(m, j) goes to
// c[m * ldc + j]; each dot product is summed over the lanes, then across them.
template <class S, int kM>
void dot_rows(int64_t rows, int64_t K, const S* a, int64_t lda, const S* w, int64_t ldw, Sum<S>* c, int64_t ldc) {
  using Op = Operand<S>;
  using T = Sum<S>;
  constexpr int kAtOnce = kLanes<T> / kM > 0 ? kLanes<T> / kM : 1;
  constexpr int kBlock = (kM * kAtOnce + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  constexpr int64_t stretch = Op::lanes * Op::pair;
  for (int64_t j = 0; j < rows; j += kAtOnce) {
    const int64_t here = rows - j < kAtOnce ? rows - j : kAtOnce;
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
      for (int i = 0; i < here; ++i) c[m * ldc + j + i] = totals[m * kAtOnce + i];
  }
}

constexpr int64_t kDotRows = 4;  // rows of A that share one reading of W

template <class S>
void dot(int64_t M, int64_t rows, int64_t K, const S* a, int64_t lda, const S* w, int64_t ldw, Sum<S>* c, int64_t ldc) {
  for (; M >= kDotRows; M -= kDotRows, a += kDotRows * lda, c += kDotRows * ldc)
    dot_rows<S, kDotRows>(rows, K, a, lda, w, ldw, c, ldc);
  if (M == 3) dot_rows<S, 3>(rows, K, a, lda, w, ldw, c, ldc);
  if (M == 2) dot_rows<S, 2>(rows, K, a, lda, w, ldw, c, ldc);
  if (M == 1) dot_rows<S, 1>(rows, K, a, lda, w, ldw, c, ldc);
}

// panel[k * width + j] = w[j * ldw + k] for j < rows, k < K, in pairs of k where these are multiplied; up to the next
// multiple of the lanes, j >= rows give 0.
template <class S>
void pack_transposed(int64_t rows, int64_t K, const S* w, int64_t ldw, S* panel, int64_t width) {
  if constexpr (Operand<S>::pair == 2) {  // a pair is as wide as a float, and moves as one
    pack_transposed(rows, K / 2, reinterpret_cast<const float*>(w), ldw / 2, reinterpret_cast<float*>(panel), width);
  } else {
    constexpr int64_t lanes = kLanes<S>;
    for (int64_t j = 0; j < rows; j += lanes)
      for (int64_t k = 0; k < K; k += lanes) {
        Vector<S> block[lanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i) block[i] = j + i < rows ? load(w + (j + i) * ldw + k, K - k) : Vector<S>{};
        transpose<S>(block);
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i)
          if (k + i < K) store(panel + (k + i) * width + j, block[i]);
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
    const int64_t here = count - j < lanes ? count - j : lanes;
    Halves low{}, high{};
    std::memcpy(&low, even + j, here * sizeof(BFloat16));
    if (odd != nullptr) std::memcpy(&high, odd + j, here * sizeof(BFloat16));
    const Pairs pairs = __builtin_convertvector(low, Pairs) | __builtin_convertvector(high, Pairs) << 16;
    std::memcpy(to + 2 * j, &pairs, 2 * here * sizeof(BFloat16));
  }
}
#endif

// panel[k * width + j] = row(k)[j] for k < K, j < columns, in pairs of k where these are multiplied; all else 0.
template <class S, class Row>
void pack_rows(int64_t K, int64_t columns, const Row& row, S* panel, int64_t width) {
  for (int64_t k = 0; k < K; k += Operand<S>::pair) {
    S* to = panel + k * width;
    if constexpr (Operand<S>::pair == 2) {
      const S* even = row(k);  // in this order: a row may be found from the one before
      interleave(even, k + 1 < K ? row(k + 1) : nullptr, columns, to);
    } else {
      std::memcpy(to, row(k), columns * sizeof(S));
    }
    std::memset(to + columns * Operand<S>::pair, 0, (width - columns) * Operand<S>::pair * sizeof(S));
  }
}

}  // namespace rnnkit::RNNKIT_CAPABILITY
