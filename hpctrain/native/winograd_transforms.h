// The transforms of winograd.h: by the matrices A, B and G of the interpolation points 0, +-a, +-b and infinity. With
// a = 5/8 and b = 3/2 the rounding error is less than half of that with the usual 1 and 2, and all entries of A and B are
// exact in float32.

#ifndef HPCTRAIN_NATIVE_WINOGRAD_TRANSFORMS_H_
#define HPCTRAIN_NATIVE_WINOGRAD_TRANSFORMS_H_

#include "avx512.h"

namespace hpctrain {

#pragma GCC push_options
#pragma GCC target("avx512f")

constexpr float kA = 0.625f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB, kA3 = kA2 * kA, kB3 = kB2 * kB;
constexpr float kNormZero = static_cast<float>(1.0 / (0.625 * 0.625 * 1.5 * 1.5));
constexpr float kNormA = static_cast<float>(1.0 / (2.0 * 0.625 * 0.625 * (0.625 * 0.625 - 1.5 * 1.5)));
constexpr float kNormB = static_cast<float>(1.0 / (2.0 * 1.5 * 1.5 * (1.5 * 1.5 - 0.625 * 0.625)));

INLINE Vector All(float value) { return _mm512_set1_ps(value); }
INLINE Vector Fma(float a, Vector b, Vector c) { return _mm512_fmadd_ps(All(a), b, c); }
INLINE Vector Times(float a, Vector b) { return _mm512_mul_ps(All(a), b); }
INLINE Vector Plus(Vector a, Vector b) { return _mm512_add_ps(a, b); }
INLINE Vector Minus(Vector a, Vector b) { return _mm512_sub_ps(a, b); }

struct OfInput {  // B^T
  static constexpr int kFrom = 6, kTo = 6;
  static INLINE void Apply(const Vector* d, int from, Vector* t, int to) {
    const Vector d0 = d[0], d1 = d[from], d2 = d[2 * from], d3 = d[3 * from], d4 = d[4 * from], d5 = d[5 * from];
    const Vector even_a = Fma(-kB2, d2, d4), odd_a = Times(kA, Fma(-kB2, d1, d3));
    const Vector even_b = Fma(-kA2, d2, d4), odd_b = Times(kB, Fma(-kA2, d1, d3));
    t[0] = Fma(kA2 * kB2, d0, Fma(-(kA2 + kB2), d2, d4));
    t[to] = Plus(even_a, odd_a);
    t[2 * to] = Minus(even_a, odd_a);
    t[3 * to] = Plus(even_b, odd_b);
    t[4 * to] = Minus(even_b, odd_b);
    t[5 * to] = Fma(kA2 * kB2, d1, Fma(-(kA2 + kB2), d3, d5));
  }
};

struct OfKernel {  // G
  static constexpr int kFrom = 3, kTo = 6;
  static INLINE void Apply(const Vector* g, int from, Vector* t, int to) {
    const Vector g0 = g[0], g1 = g[from], g2 = g[2 * from];
    const Vector even_a = Times(kNormA, Fma(kA2, g2, g0)), odd_a = Times(kNormA * kA, g1);
    const Vector even_b = Times(kNormB, Fma(kB2, g2, g0)), odd_b = Times(kNormB * kB, g1);
    t[0] = Times(kNormZero, g0);
    t[to] = Plus(even_a, odd_a);
    t[2 * to] = Minus(even_a, odd_a);
    t[3 * to] = Plus(even_b, odd_b);
    t[4 * to] = Minus(even_b, odd_b);
    t[5 * to] = g2;
  }
};

struct ToKernel {  // G^T
  static constexpr int kFrom = 6, kTo = 3;
  static INLINE void Apply(const Vector* u, int from, Vector* t, int to) {
    const Vector sum_a = Times(kNormA, Plus(u[from], u[2 * from]));
    const Vector difference_a = Times(kNormA * kA, Minus(u[from], u[2 * from]));
    const Vector sum_b = Times(kNormB, Plus(u[3 * from], u[4 * from]));
    const Vector difference_b = Times(kNormB * kB, Minus(u[3 * from], u[4 * from]));
    t[0] = Fma(kNormZero, u[0], Plus(sum_a, sum_b));
    t[to] = Plus(difference_a, difference_b);
    t[2 * to] = Fma(kA2, sum_a, Fma(kB2, sum_b, u[5 * from]));
  }
};

struct ToOutput {  // A^T
  static constexpr int kFrom = 6, kTo = 4;
  static INLINE void Apply(const Vector* m, int from, Vector* y, int to) {
    const Vector sum_a = Plus(m[from], m[2 * from]), difference_a = Minus(m[from], m[2 * from]);
    const Vector sum_b = Plus(m[3 * from], m[4 * from]), difference_b = Minus(m[3 * from], m[4 * from]);
    y[0] = Plus(m[0], Plus(sum_a, sum_b));
    y[to] = Fma(kA, difference_a, Times(kB, difference_b));
    y[2 * to] = Fma(kA2, sum_a, Times(kB2, sum_b));
    y[3 * to] = Fma(kA3, difference_a, Fma(kB3, difference_b, m[5 * from]));
  }
};

struct OfGradient {  // A
  static constexpr int kFrom = 4, kTo = 6;
  static INLINE void Apply(const Vector* y, int from, Vector* t, int to) {
    const Vector y0 = y[0], y1 = y[from], y2 = y[2 * from], y3 = y[3 * from];
    const Vector even_a = Fma(kA2, y2, y0), odd_a = Fma(kA3, y3, Times(kA, y1));
    const Vector even_b = Fma(kB2, y2, y0), odd_b = Fma(kB3, y3, Times(kB, y1));
    t[0] = y0;
    t[to] = Plus(even_a, odd_a);
    t[2 * to] = Minus(even_a, odd_a);
    t[3 * to] = Plus(even_b, odd_b);
    t[4 * to] = Minus(even_b, odd_b);
    t[5 * to] = y3;
  }
};

// Both dimensions of a tile: kFrom x kFrom vectors to kTo x kTo.
template <typename Transform>
INLINE void Apply(const Vector* tile, Vector* transformed) {
  constexpr int kFrom = Transform::kFrom, kTo = Transform::kTo;
  Vector half[kTo * kFrom];
#pragma GCC unroll 6
  for (int column = 0; column < kFrom; ++column) Transform::Apply(tile + column, kFrom, half + column, kFrom);
#pragma GCC unroll 6
  for (int row = 0; row < kTo; ++row) Transform::Apply(half + row * kFrom, 1, transformed + row * kTo, 1);
}

#pragma GCC pop_options

}  // namespace hpctrain

#endif  // HPCTRAIN_NATIVE_WINOGRAD_TRANSFORMS_H_
