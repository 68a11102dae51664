// 3x3 convolutions with stride 1 and a border of one zero, forward and backward, by Winograd's F(4x4, 3x3) (Lavin and
// Gray 2015, arXiv 1509.09308): 36 multiplications where the definition takes 144.
//
// An output tile of 4x4 comes from an input tile of 6x6, which shares two rows and columns with each of its neighbours:
//   y = A^T ((G w G^T) * (B^T x B)) A, summed over the input channels, * number by number.
// So each of the 36 numbers of a transformed tile is, over all tiles and channels, a product of two matrices.
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

#include "avx512.h"
#include "products.h"
#include "winograd_transforms.h"

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
  // The same matrices from one of their numbers on.
  Matrices From(int64_t number) const { return Matrices(*this, number); }
  float* operator[](int position) const { return first + position * apart; }
  float* end() const { return first + kPositions * apart; }

  static int64_t Room(int64_t numbers) { return kPositions * (numbers + kVector); }

 private:
  Matrices(const Matrices& all, int64_t number) : first(all.first + number), apart(all.apart) {}
};

#pragma GCC push_options
#pragma GCC target("avx512f")

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

// Transforms products, to[position] being [tile][channel], to some channels of an image's tiles, which are written to y;
// what lies outside of the image to `outside`, room for as many numbers as channels.
inline void TransformProducts(const Shape& shape, const Matrices& products, const Range& tiles, const Range& channels,
                              float* y, int64_t image_channels, float* outside) {
  for (int64_t tile = 0; tile < tiles.size(); ++tile) {
    float* places[16];
    Find<4, 0>(shape, tiles.begin + tile, y + channels.begin, image_channels, outside, places);
    for (int64_t c = 0; c < channels.size(); c += kVector) {
      Vector transformed[kPositions], pixels[16];
#pragma GCC unroll 36
      for (int i = 0; i < kPositions; ++i) transformed[i] = _mm512_loadu_ps(products[i] + tile * channels.size() + c);
      Apply<ToOutput>(transformed, pixels);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_ps(places[i] + c, pixels[i]);
    }
  }
}

// ---------------------------------------------------------------- kernels

// Some rows and columns of a kernel. Rows and columns are its input and output channels, or, with the kernel turned, the
// output and input channels.
struct KernelPart {
  Range rows, columns;
};

// Transforms a part: to[position] is [panel][row][column of the panel].
inline void TransformKernel(const float* kernel, const Shape& shape, bool turned, const KernelPart& part,
                            const Matrices& to) {
  const int64_t tap = shape.in * shape.out;
  for (int64_t panel = part.columns.begin; panel < part.columns.end; panel += kPanel) {
    const int64_t width = std::min<int64_t>(kPanel, part.columns.end - panel);
    const Matrices to_panel = to.From((panel - part.columns.begin) * part.rows.size());
    for (int64_t first = part.rows.begin; first < part.rows.end; first += kVector) {
      for (int64_t c = 0; c < width; c += kVector) {
        Vector turned_taps[9][kVector];
        for (int i = 0; turned && i < 9; ++i) {
          __m512i columns[kVector];
#pragma GCC unroll 16
          for (int j = 0; j < kVector; ++j) {
            columns[j] = _mm512_loadu_si512(kernel + (8 - i) * tap + (panel + c + j) * shape.out + first);
          }
          Turn(columns);
#pragma GCC unroll 16
          for (int j = 0; j < kVector; ++j) turned_taps[i][j] = _mm512_castsi512_ps(columns[j]);
        }
        for (int64_t row = 0; row < kVector; ++row) {
          Vector taps[9], transformed[kPositions];
#pragma GCC unroll 9
          for (int i = 0; i < 9; ++i) {
            taps[i] = turned ? turned_taps[i][row]
                             : _mm512_loadu_ps(kernel + i * tap + (first + row) * shape.out + panel + c);
          }
          Apply<OfKernel>(taps, transformed);
          const int64_t at = (first - part.rows.begin + row) * width + c;
#pragma GCC unroll 36
          for (int i = 0; i < kPositions; ++i) _mm512_storeu_ps(to_panel[i] + at, transformed[i]);
        }
      }
    }
  }
}

// Transforms sums of products, sums[position] being [row][column], to the taps of a part of a kernel, which has rows of
// `in` and columns of `out`. They are added to dw if `adding`.
inline void TransformSums(const Matrices& sums, const Shape& shape, const KernelPart& part, bool adding, float* dw) {
  for (int64_t row = 0; row < part.rows.size(); ++row) {
    for (int64_t c = 0; c < part.columns.size(); c += kVector) {
      Vector transformed[kPositions], taps[9];
#pragma GCC unroll 36
      for (int i = 0; i < kPositions; ++i) transformed[i] = _mm512_loadu_ps(sums[i] + row * part.columns.size() + c);
      Apply<ToKernel>(transformed, taps);
      float* const at = dw + (part.rows.begin + row) * shape.out + part.columns.begin + c;
      for (int i = 0; i < 9; ++i) {
        float* const to = at + i * shape.in * shape.out;
        _mm512_storeu_ps(to, adding ? Plus(_mm512_loadu_ps(to), taps[i]) : taps[i]);
      }
    }
  }
}

// ---------------------------------------------------------------- convolutions

// Of the tiles and the kernel one is transformed in advance, the one that has fewer numbers; the other one a part at a
// time, which then stays in the cache. The results are the same.

inline int64_t ConvolveTilesRoom(int64_t tiles, int64_t from, int64_t to) {
  return Matrices::Room(tiles * from) + Matrices::Room(tiles * to) + to;
}

// Convolves some tiles of x, which has `from` channels, with a transformed kernel into y, which has `to`. `scratch` has
// room for ConvolveTilesRoom numbers.
inline void ConvolveTiles(const Shape& shape, const float* x, int64_t from, const Matrices& kernel, const Range& tiles,
                          const float* zeros, float* scratch, float* y, int64_t to) {
  const Matrices inputs(scratch, tiles.size() * from), products(inputs.end(), tiles.size() * to);
  TransformTiles<OfInput, 1>(shape, x, from, {0, from}, tiles, from, zeros, inputs);
  for (int i = 0; i < kPositions; ++i) {
    Multiply(inputs[i], from, 1, kernel[i], tiles.size(), to, from, products[i], false);
  }
  TransformProducts(shape, products, tiles, {0, to}, y, to, products.end());
}

constexpr int64_t kRowsAtOnce = 256;  // of a panel of the kernel, which are transformed, then multiplied

inline int64_t ConvolvePanelRoom(int64_t tiles) {
  return Matrices::Room(tiles * kPanel) + Matrices::Room(kRowsAtOnce * kPanel) + kPanel;
}

// Convolves all tiles, transformed, with a panel of the kernel's columns. `scratch` has room for ConvolvePanelRoom numbers.
inline void ConvolvePanel(const Shape& shape, const Matrices& inputs, int64_t from, const float* kernel, bool turned,
                          const Range& columns, float* scratch, float* y, int64_t to) {
  const int64_t tiles = shape.tiles();
  const Matrices products(scratch, tiles * columns.size()), panel(products.end(), kRowsAtOnce * columns.size());
  for (int64_t row = 0; row < from; row += kRowsAtOnce) {
    const Range rows{row, std::min(from, row + kRowsAtOnce)};
    TransformKernel(kernel, shape, turned, {rows, columns}, panel);
    for (int i = 0; i < kPositions; ++i) {
      Multiply(inputs[i] + row, from, 1, panel[i], tiles, columns.size(), rows.size(), products[i], row > 0);
    }
  }
  TransformProducts(shape, products, {0, tiles}, columns, y, to, panel.end());
}

// ---------------------------------------------------------------- gradients of kernels

inline int64_t GradientOfTilesRoom(int64_t tiles_at_once, int64_t in, int64_t out) {
  return Matrices::Room(tiles_at_once * in) + Matrices::Room(tiles_at_once * out) + Matrices::Room(in * out);
}

// Writes what some tiles have of the gradient of a kernel, all of it, into dw[9][in][out]. `scratch` has room for
// GradientOfTilesRoom numbers.
inline void GradientOfTiles(const Shape& shape, const float* x, const float* dy, const Range& all_tiles,
                            int64_t tiles_at_once, const float* zeros, float* scratch, float* dw) {
  const Matrices sums(scratch, shape.in * shape.out);
  for (int64_t begin = all_tiles.begin; begin < all_tiles.end; begin += tiles_at_once) {
    const Range tiles{begin, std::min(all_tiles.end, begin + tiles_at_once)};
    const Matrices inputs(sums.end(), tiles.size() * shape.in), gradients(inputs.end(), tiles.size() * shape.out);
    TransformTiles<OfInput, 1>(shape, x, shape.in, {0, shape.in}, tiles, shape.in, zeros, inputs);
    TransformTiles<OfGradient, 0>(shape, dy, shape.out, {0, shape.out}, tiles, kPanel, zeros, gradients);
    for (int i = 0; i < kPositions; ++i) {
      Multiply(inputs[i], 1, shape.in, gradients[i], shape.in, shape.out, tiles.size(), sums[i], begin > all_tiles.begin);
    }
  }
  TransformSums(sums, shape, {{0, shape.in}, {0, shape.out}}, false, dw);
}

// Writes what some tiles have of a part of the gradient into dw[9][in][out], or adds it. The part's rows of the transformed
// tiles are inputs[position][tile][row], and its columns, a panel, are gradients[position][tile][column]. `scratch` has room
// for the 36 matrices of a part.
inline void GradientOfPart(const Shape& shape, const Matrices& inputs, const Matrices& gradients, int64_t tiles,
                           const KernelPart& part, bool adding, float* scratch, float* dw) {
  const int64_t rows = part.rows.size(), columns = part.columns.size();
  const Matrices sums(scratch, rows * columns);
  for (int i = 0; i < kPositions; ++i) Multiply(inputs[i], 1, rows, gradients[i], rows, columns, tiles, sums[i], false);
  TransformSums(sums, shape, part, adding, dw);
}

#pragma GCC pop_options

}  // namespace hpctrain

#endif  // HPCTRAIN_NATIVE_WINOGRAD_H_
