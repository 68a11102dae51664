// 3x3 convolutions with stride 1 and a border of one zero, forward and backward, by Winograd's F(4x4, 3x3) (Lavin and
// Gray 2015, arXiv 1509.09308): 36 multiplications where the definition takes 144.
//
// An output tile of 4x4 comes from an input tile of 6x6, which shares two rows and columns with each of its neighbours:
//   y = A^T ((G w G^T) * (B^T x B)) A, summed over the input channels, * number by number.
// So each of the 36 numbers of a transformed tile is, over all tiles and channels, a product of two matrices. The
// matrices A, B and G are those of the interpolation points 0, +-a, +-b and infinity. With a = 5/8 and b = 3/2 the
// rounding error is less than half of that with the usual 1 and 2, and all entries of A and B are exact in float32.
//
// The gradient of the input is the convolution of the gradient with the kernel turned by 180 degrees, its input and
// output channels exchanged. The gradient of the kernel is the adjoint of the formula in w:
//   dw = G^T ((A dy A^T) * (B^T x B)) G, summed over the tiles.
//
// Activations are [images, height, width, channels], kernels [3, 3, in, out], float32; channels are multiples of 16.
// Tiles are counted through all images. For AVX-512.

#ifndef HPCTRAIN_NATIVE_WINOGRAD_H_
#define HPCTRAIN_NATIVE_WINOGRAD_H_

#include <algorithm>
#include <cstdint>

#include "products.h"

namespace hpctrain {

constexpr int kPositions = 36;  // numbers of a transformed tile

struct Shape {
  int64_t images, height, width, in, out;

  int64_t tiles_high() const { return (height + 3) / 4; }
  int64_t tiles_wide() const { return (width + 3) / 4; }
  int64_t tiles() const { return images * tiles_high() * tiles_wide(); }
};

// The 36 matrices of one kind, of `numbers` each. Not a power of two apart: they would want the same few lines of the
// cache.
struct Matrices {
  float* first;
  int64_t apart;

  Matrices(float* memory, int64_t numbers) : first(memory), apart(numbers + kVector) {}
  float* operator[](int position) const { return first + position * apart; }
  float* end() const { return first + kPositions * apart; }

  static int64_t Room(int64_t numbers) { return kPositions * (numbers + kVector); }
};

#pragma GCC push_options
#pragma GCC target("avx512f")

// ---------------------------------------------------------------- transforms of one dimension

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

// ---------------------------------------------------------------- tiles

// Where the size x size pixels of a tile are, each at the first of its channels; those outside of the image are at
// `outside`. `before` is how many rows and columns of the tile come before the output tile.
template <int size, int before, typename Number>
INLINE void Find(const Shape& shape, int64_t tile, Number* image, int64_t channels, Number* outside, Number** places) {
  const int64_t column = tile % shape.tiles_wide(), row = tile / shape.tiles_wide() % shape.tiles_high();
  image += tile / (shape.tiles_wide() * shape.tiles_high()) * shape.height * shape.width * channels;
  for (int i = 0; i < size; ++i) {
    const int64_t y = row * 4 - before + i;
    for (int j = 0; j < size; ++j) {
      const int64_t x = column * 4 - before + j;
      const bool inside = y >= 0 && y < shape.height && x >= 0 && x < shape.width;
      places[i * size + j] = inside ? image + (y * shape.width + x) * channels : outside;
    }
  }
}

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// Transforms some channels of an image's tiles, for products with panels of that many columns: to[position] is
// [panel][tile][channel of the panel]; with one panel that is [tile][channel]. `zeros` are as many as channels.
template <typename Transform, int before>
inline void TransformTiles(const Shape& shape, const float* image, int64_t image_channels, const Range& channels,
                           const Range& tiles, int64_t panel, const float* zeros, const Matrices& to) {
  constexpr int kSize = Transform::kFrom;
  for (int64_t tile = 0; tile < tiles.size(); ++tile) {
    const float* places[kSize * kSize];
    Find<kSize, before>(shape, tiles.begin + tile, image + channels.begin, image_channels, zeros, places);
    for (int64_t first = 0; first < channels.size(); first += panel) {
      const int64_t width = std::min(panel, channels.size() - first);
      for (int64_t c = 0; c < width; c += kVector) {
        Vector from[kSize * kSize], transformed[kPositions];
#pragma GCC unroll 36
        for (int i = 0; i < kSize * kSize; ++i) from[i] = _mm512_loadu_ps(places[i] + first + c);
        Apply<Transform>(from, transformed);
        const int64_t at = first * tiles.size() + tile * width + c;
#pragma GCC unroll 36
        for (int i = 0; i < kPositions; ++i) _mm512_storeu_ps(to[i] + at, transformed[i]);
      }
    }
  }
}

// ---------------------------------------------------------------- the three passes

// Transforms some columns of the kernel, from a multiple of kPanel on: to[position] is [panel][k][column of the panel].
// Rows k and columns are the input and output channels, or, with the kernel turned, the output and input channels.
inline void TransformKernel(const float* kernel, const Shape& shape, bool turned, const Range& columns,
                            const Matrices& to) {
  const int64_t k = turned ? shape.out : shape.in, tap = shape.in * shape.out;
  const __m512i rows = _mm512_mullo_epi32(_mm512_set1_epi32(static_cast<int>(shape.out)),
                                          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (int64_t panel = columns.begin; panel < columns.end; panel += kPanel) {
    const int64_t width = std::min<int64_t>(kPanel, columns.end - panel);
    for (int64_t row = 0; row < k; ++row) {
      for (int64_t c = 0; c < width; c += kVector) {
        Vector taps[9], transformed[kPositions];
#pragma GCC unroll 9
        for (int i = 0; i < 9; ++i) {
          taps[i] = turned ? _mm512_i32gather_ps(rows, kernel + (8 - i) * tap + (panel + c) * shape.out + row, 4)
                           : _mm512_loadu_ps(kernel + i * tap + row * shape.out + panel + c);
        }
        Apply<OfKernel>(taps, transformed);
#pragma GCC unroll 36
        for (int i = 0; i < kPositions; ++i) {
          _mm512_storeu_ps(to[i] + panel * k + row * width + c, transformed[i]);
        }
      }
    }
  }
}

inline int64_t ConvolveRoom(int64_t tiles, int64_t from, int64_t to) {
  return Matrices::Room(tiles * from) + Matrices::Room(tiles * to) + to;
}

// Convolves some tiles of x, which has `from` channels, with a transformed kernel into y, which has `to`. `scratch` has
// room for ConvolveRoom numbers.
inline void Convolve(const Shape& shape, const float* x, int64_t from, const Matrices& kernel, const Range& tiles,
                     const float* zeros, float* scratch, float* y, int64_t to) {
  const Matrices inputs(scratch, tiles.size() * from), products(inputs.end(), tiles.size() * to);
  float* const outside = products.end();
  TransformTiles<OfInput, 1>(shape, x, from, {0, from}, tiles, from, zeros, inputs);
  for (int i = 0; i < kPositions; ++i) {
    Multiply(inputs[i], from, 1, kernel[i], tiles.size(), to, from, products[i], false);
  }
  for (int64_t tile = 0; tile < tiles.size(); ++tile) {
    float* places[16];
    Find<4, 0>(shape, tiles.begin + tile, y, to, outside, places);
    for (int64_t c = 0; c < to; c += kVector) {
      Vector transformed[kPositions], pixels[16];
#pragma GCC unroll 36
      for (int i = 0; i < kPositions; ++i) transformed[i] = _mm512_loadu_ps(products[i] + tile * to + c);
      Apply<ToOutput>(transformed, pixels);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_ps(places[i] + c, pixels[i]);
    }
  }
}

// A part of the gradient of the kernel: some channels, summed over some tiles.
struct Part {
  Range in, out, tiles;
};

inline int64_t KernelGradientRoom(int64_t tiles_at_once, int64_t in, int64_t out) {
  return Matrices::Room(tiles_at_once * in) + Matrices::Room(tiles_at_once * out) + Matrices::Room(in * out);
}

// Writes a part of the gradient into dw[9][in][out]. `scratch` has room for KernelGradientRoom numbers.
inline void KernelGradient(const Shape& shape, const float* x, const float* dy, const Part& part,
                           int64_t tiles_at_once, const float* zeros, float* scratch, float* dw) {
  const int64_t in = part.in.size(), out = part.out.size();
  const Matrices sums(scratch, in * out);
  for (int64_t begin = part.tiles.begin; begin < part.tiles.end; begin += tiles_at_once) {
    const Range tiles{begin, std::min(part.tiles.end, begin + tiles_at_once)};
    const Matrices inputs(sums.end(), tiles.size() * in), gradients(inputs.end(), tiles.size() * out);
    TransformTiles<OfInput, 1>(shape, x, shape.in, part.in, tiles, in, zeros, inputs);
    TransformTiles<OfGradient, 0>(shape, dy, shape.out, part.out, tiles, kPanel, zeros, gradients);
    for (int i = 0; i < kPositions; ++i) {
      Multiply(inputs[i], 1, in, gradients[i], in, out, tiles.size(), sums[i], begin > part.tiles.begin);
    }
  }
  for (int64_t row = 0; row < in; ++row) {
    for (int64_t c = 0; c < out; c += kVector) {
      Vector transformed[kPositions], taps[9];
#pragma GCC unroll 36
      for (int i = 0; i < kPositions; ++i) transformed[i] = _mm512_loadu_ps(sums[i] + row * out + c);
      Apply<ToKernel>(transformed, taps);
      float* const at = dw + (part.in.begin + row) * shape.out + part.out.begin + c;
#pragma GCC unroll 9
      for (int i = 0; i < 9; ++i) _mm512_storeu_ps(at + i * shape.in * shape.out, taps[i]);
    }
  }
}

#pragma GCC pop_options

}  // namespace hpctrain

#endif  // HPCTRAIN_NATIVE_WINOGRAD_H_
