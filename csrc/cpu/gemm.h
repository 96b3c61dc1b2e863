// The one micro-kernel under every matrix product, and the packing of its B operand.
//
// Each element of C is summed over k in order, one fused multiply-add at a time, however the rows and columns are
// tiled: the same bits for every split of them over threads.
#pragma once

#include <utility>

#include "common/lanes.h"

namespace rnnkit::RNNKIT_CAPABILITY {

// A(m, k) = a[m * row + k * column]
template <class T>
struct MatrixA {
  const T* a;
  int64_t row, column;
};

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

// C[kRows, kVectors * lanes] (+)= A B, all of C in registers.
template <class T, int kRows, int kVectors>
RNNKIT_INLINE void tile(int64_t K, MatrixA<T> A, const T* b, int64_t ldb, T* c, int64_t ldc, bool add) {
  Vector<T> sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[m][v] = Vector<T>{};
  for (int64_t k = 0; k < K; ++k) {
    Vector<T> columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = load(b + k * ldb + v * kLanes<T>);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vector<T> a = splat(A.a[m * A.row + k * A.column]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[m][v] += a * columns[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* to = c + m * ldc + v * kLanes<T>;
      store(to, add ? load(to) + sums[m][v] : sums[m][v]);
    }
}

template <class T, int kVectors, int kRows = rows_in_tile(kVectors)>
inline void tile_of(int64_t rows, int64_t K, MatrixA<T> A, const T* b, int64_t ldb, T* c, int64_t ldc, bool add) {
  if (rows == kRows)
    tile<T, kRows, kVectors>(K, A, b, ldb, c, ldc, add);
  else if constexpr (kRows > 1)
    tile_of<T, kVectors, kRows - 1>(rows, K, A, b, ldb, c, ldc, add);
}

// C[M, kVectors * lanes] (+)= A B, in tiles of nearly equal height.
template <class T, int kVectors>
void strip(int64_t M, int64_t K, MatrixA<T> A, const T* b, int64_t ldb, T* c, int64_t ldc, bool add) {
  constexpr int64_t most = rows_in_tile(kVectors);
  const int64_t tiles = (M + most - 1) / most;
  for (int64_t i = 0, m = 0; i < tiles; ++i) {
    const int64_t rows = (M - m) / (tiles - i);
    tile_of<T, kVectors>(rows, K, {A.a + m * A.row, A.row, A.column}, b, ldb, c + m * ldc, ldc, add);
    m += rows;
  }
}

// C[M, N] (+)= A[M, K] B[K, N]. B is row-major; where N is not a multiple of the lanes, each of its rows must be
// readable up to the next multiple. C is written in its N columns only.
template <class T>
void gemm(int64_t M, int64_t N, int64_t K, MatrixA<T> A, const T* b, int64_t ldb, T* c, int64_t ldc, bool add) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t n = 0;
  for (; n + kVectorsInTile * lanes <= N; n += kVectorsInTile * lanes)
    strip<T, kVectorsInTile>(M, K, A, b + n, ldb, c + n, ldc, add);
  if constexpr (kVectorsInTile == 4) {
    if (n + 3 * lanes <= N) {
      strip<T, 3>(M, K, A, b + n, ldb, c + n, ldc, add);
      n += 3 * lanes;
    } else if (n + 2 * lanes <= N) {
      strip<T, 2>(M, K, A, b + n, ldb, c + n, ldc, add);
      n += 2 * lanes;
    }
  }
  if (n + lanes <= N) {
    strip<T, 1>(M, K, A, b + n, ldb, c + n, ldc, add);
    n += lanes;
  }
  if (n == N) return;
  constexpr int64_t block = 16;
  alignas(64) T edge[block * lanes];
  for (int64_t m = 0; m < M; m += block) {
    const int64_t rows = M - m < block ? M - m : block;
    for (int64_t i = 0; add && i < rows; ++i) store(edge + i * lanes, load(c + (m + i) * ldc + n, N - n));
    strip<T, 1>(rows, K, {A.a + m * A.row, A.row, A.column}, b + n, ldb, edge, lanes, add);
    for (int64_t i = 0; i < rows; ++i) store(c + (m + i) * ldc + n, load(edge + i * lanes), N - n);
  }
}

// C[M, rows] = A[M, K] W^T for few rows of A, W [rows, K] as it lies: nothing is packed. C(m, j) goes to
// c[m * ldc + j]; each dot product is summed over the lanes, then across them.
template <class T, int kM>
void dot_rows(int64_t rows, int64_t K, const T* a, int64_t lda, const T* w, int64_t ldw, T* c, int64_t ldc) {
  constexpr int kAtOnce = kM == 1 ? 8 : 4;
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t j = 0; j < rows; j += kAtOnce) {
    const int64_t here = rows - j < kAtOnce ? rows - j : kAtOnce;
    const T* row[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i) row[i] = w + (j + (i < here ? i : 0)) * ldw;
    Vector<T> sums[kM][kAtOnce] = {};
    int64_t k = 0;
    for (; k + lanes <= K; k += lanes) {
      Vector<T> x[kM];
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) x[m] = load(a + m * lda + k);
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) {
        const Vector<T> weights = load(row[i] + k);
#pragma GCC unroll 4
        for (int m = 0; m < kM; ++m) sums[m][i] += x[m] * weights;
      }
    }
    if (k < K)
      for (int i = 0; i < kAtOnce; ++i)
        for (int m = 0; m < kM; ++m) sums[m][i] += load(a + m * lda + k, K - k) * load(row[i] + k, K - k);
    for (int m = 0; m < kM; ++m)
      for (int i = 0; i < here; ++i) c[m * ldc + j + i] = sum<T>(sums[m][i]);
  }
}

constexpr int64_t kDotRows = 4;  // rows of A that share one reading of W

template <class T>
void dot(int64_t M, int64_t rows, int64_t K, const T* a, int64_t lda, const T* w, int64_t ldw, T* c, int64_t ldc) {
  for (; M >= kDotRows; M -= kDotRows, a += kDotRows * lda, c += kDotRows * ldc)
    dot_rows<T, kDotRows>(rows, K, a, lda, w, ldw, c, ldc);
  if (M == 3) dot_rows<T, 3>(rows, K, a, lda, w, ldw, c, ldc);
  if (M == 2) dot_rows<T, 2>(rows, K, a, lda, w, ldw, c, ldc);
  if (M == 1) dot_rows<T, 1>(rows, K, a, lda, w, ldw, c, ldc);
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

// panel[k * width + j] = w[j * ldw + k] for j < rows, k < K; up to the next multiple of the lanes, j >= rows give 0.
template <class T>
void pack_transposed(int64_t rows, int64_t K, const T* w, int64_t ldw, T* panel, int64_t width) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t j = 0; j < rows; j += lanes)
    for (int64_t k = 0; k < K; k += lanes) {
      Vector<T> block[lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) block[i] = j + i < rows ? load(w + (j + i) * ldw + k, K - k) : Vector<T>{};
      transpose<T>(block);
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i)
        if (k + i < K) store(panel + (k + i) * width + j, block[i]);
    }
}

// panel[k * width + j] = row(k)[j] for j < columns; the other columns of the panel 0.
template <class T, class Row>
void pack_rows(int64_t K, int64_t columns, const Row& row, T* panel, int64_t width) {
  for (int64_t k = 0; k < K; ++k) {
    const T* from = row(k);
    T* to = panel + k * width;
    if (from != nullptr)
      std::memcpy(to, from, columns * sizeof(T));
    else
      std::memset(to, 0, columns * sizeof(T));
    std::memset(to + columns, 0, (width - columns) * sizeof(T));
  }
}

}  // namespace rnnkit::RNNKIT_CAPABILITY
