// Products of matrices of float32 numbers in the registers of AVX-512, of which convolutions are made.
//
// Each number of a product is summed up in one register in the order of k, whatever is computed beside it.

#ifndef HPCTRAIN_NATIVE_PRODUCTS_H_
#define HPCTRAIN_NATIVE_PRODUCTS_H_

#include <cstdint>

#include "avx512.h"

namespace hpctrain {

constexpr int64_t kPanel = 32;   // columns of a product that are worked on together
constexpr int kRows = 14;    // rows of a product that are: 14 x 2 of the 32 registers hold sums

#pragma GCC push_options
#pragma GCC target("avx512f")

// c[rows][columns] = or += a[rows][k] b[k][columns], a's numbers a_row and a_k apart, the columns `vectors` vectors.
template <int rows, int vectors>
inline void Product(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t k, float* c, int64_t c_row,
             bool adding) {
  Vector sums[rows][vectors];
#pragma GCC unroll 14
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      sums[row][v] = adding ? _mm512_loadu_ps(c + row * c_row + v * kVector) : _mm512_setzero_ps();
    }
  }
  for (int64_t i = 0; i < k; ++i, a += a_k, b += vectors * kVector) {
    Vector columns[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) columns[v] = _mm512_loadu_ps(b + v * kVector);
#pragma GCC unroll 14
    for (int row = 0; row < rows; ++row) {
      const Vector number = _mm512_set1_ps(a[row * a_row]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[row][v] = _mm512_fmadd_ps(number, columns[v], sums[row][v]);
    }
  }
#pragma GCC unroll 14
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) _mm512_storeu_ps(c + row * c_row + v * kVector, sums[row][v]);
  }
}

using ProductOfRows = void (*)(const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t, bool);

template <int vectors>
INLINE ProductOfRows ForRows(int64_t rows) {
  static constexpr ProductOfRows kAll[kRows] = {
      Product<1, vectors>, Product<2, vectors>,  Product<3, vectors>,  Product<4, vectors>,  Product<5, vectors>,
      Product<6, vectors>, Product<7, vectors>,  Product<8, vectors>,  Product<9, vectors>,  Product<10, vectors>,
      Product<11, vectors>, Product<12, vectors>, Product<13, vectors>, Product<14, vectors>};
  return kAll[rows - 1];
}

// c[m][n] = or += a[m][k] b[k][n], a's numbers a_row and a_k apart. b's columns are in panels of kPanel, one panel
// [k][columns] after the other, the last one maybe of half.
inline void Multiply(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t m, int64_t n, int64_t k,
                     float* c, bool adding) {
  const int64_t blocks = (m + kRows - 1) / kRows;
  for (int64_t panel = 0; panel < n; panel += kPanel) {
    const bool whole = n - panel >= kPanel;
    for (int64_t block = 0; block < blocks; ++block) {  // as even as can be: a few rows alone would be slow
      const int64_t begin = block * m / blocks, rows = (block + 1) * m / blocks - begin;
      (whole ? ForRows<2>(rows) : ForRows<1>(rows))(a + begin * a_row, a_row, a_k, b + panel * k, k,
                                                    c + begin * n + panel, n, adding);
    }
  }
}

#pragma GCC pop_options

}  // namespace hpctrain

#endif  // HPCTRAIN_NATIVE_PRODUCTS_H_
