// The gradient of a convolution's kernel from bfloat16 images x and gradients dy of its output: how these are laid out
// for instructions that multiply bfloat16 numbers exactly and add up in float32. kernel_grad_products.h has the products.
//
//   dw[i][j][in][out] = sum over images, rows r and columns c of x[r * stride + i - top][c * stride + j - left][in]
//                       * dy[r][c][out]
//
// Tiles are multiplied: 16 numbers of `in` times 32 positions with 32 positions times 16 numbers of `out`. So
// x is laid out with positions side by side ("turned": [in][position]), and dy with two positions of a number side by
// side ("paired": [position / 2][out][2]).
//
// Positions are those of a grid in which images are surrounded by zeros, so that the pixel that the tap (i, j) takes is
// always as many positions ahead: the same two layouts do for all taps, only that turned x is read from another position
// on. With a stride there is one turned x for each remainder of i and j (a phase). Borders of zeros are shared between
// neighbouring rows and images where both have them.

#ifndef HPCTRAIN_NATIVE_KERNEL_GRAD_H_
#define HPCTRAIN_NATIVE_KERNEL_GRAD_H_

#include <algorithm>
#include <cstdint>

#include "avx512.h"

namespace hpctrain {

using Bits = uint16_t;  // of a bfloat16 number

constexpr int64_t kTile = 16;       // rows of a tile, and float32 numbers of one of its rows
constexpr int64_t kPositions = 32;  // of a tile: bfloat16 numbers of a row

INLINE int64_t Parts(int64_t number, int64_t of) { return (number + of - 1) / of; }
INLINE int64_t RoundUp(int64_t number, int64_t to) { return Parts(number, to) * to; }

struct Convolution {
  int64_t images, height, width, pixel;  // of x; a pixel takes so many numbers
  int64_t out_height, out_width;         // of dy
  int64_t channels_in, channels_out;     // of a tap
  int64_t kernel_height, kernel_width, stride, top, left;

  // Channels in whole tiles.
  int64_t in() const { return RoundUp(channels_in, kTile); }
  int64_t out() const { return RoundUp(channels_out, kTile); }
  int64_t phases_high() const { return std::min(stride, kernel_height); }
  int64_t phases_wide() const { return std::min(stride, kernel_width); }
  int64_t phases() const { return phases_high() * phases_wide(); }
  // Of x, as far as a tap reads it: what lies beyond may be infinite.
  int64_t read_height() const { return std::min(height, (out_height - 1) * stride + kernel_height - top); }
  int64_t read_width() const { return std::min(width, (out_width - 1) * stride + kernel_width - left); }
};

// How many zeros are before (after) the pixels of x in a line of `length` places of the grid, whatever the phase.
inline int64_t FewestZeros(bool before, int64_t length, int64_t phases, int64_t stride, int64_t margin, int64_t size) {
  int64_t fewest = length;
  for (int64_t phase = 0; phase < phases; ++phase) {
    const auto is_zero = [&](int64_t place) {
      const int64_t pixel = place * stride + phase - margin;
      return pixel < 0 || pixel >= size;
    };
    int64_t zeros = 0;
    while (zeros < length && is_zero(before ? zeros : length - 1 - zeros)) ++zeros;
    fewest = std::min(fewest, zeros);
  }
  return fewest;
}

// The grid: each row of the output takes `period` positions, each image `image` positions, of which the last may be of
// zeros alone. The pixel of the last tap is `farthest` positions ahead of that of the first.
struct Grid {
  int64_t period, image, farthest;

  explicit Grid(const Convolution& of) {
    const int64_t rows_ahead = (of.kernel_height - 1) / of.stride, columns_ahead = (of.kernel_width - 1) / of.stride;
    const int64_t high = of.out_height + rows_ahead, wide = of.out_width + columns_ahead;
    period = wide - SharedZeros(wide, of.phases_wide(), of.stride, of.left, of.width);
    image = (high - SharedZeros(high, of.phases_high(), of.stride, of.top, of.height)) * period;
    farthest = rows_ahead * period + columns_ahead;
  }

  // How many positions ahead the pixel of a tap is, in its phase.
  int64_t Ahead(const Convolution& of, int64_t row, int64_t column) const {
    return row / of.stride * period + column / of.stride;
  }

 private:
  static int64_t SharedZeros(int64_t length, int64_t phases, int64_t stride, int64_t margin, int64_t size) {
    return std::min(FewestZeros(true, length, phases, stride, margin, size),
                    FewestZeros(false, length, phases, stride, margin, size));
  }
};

// Some positions that are laid out and multiplied together: whole tiles of dy's, and those of x from the same one on
// that their taps reach.
struct Band {
  int64_t begin, of_dy, of_x;

  Band(const Grid& grid, int64_t begin, int64_t size) : begin(begin), of_dy(size) {
    of_x = RoundUp(size + grid.farthest, kPositions);
    // Rows of a tile are in different lines of the cache.
    if (of_x % (2 * kPositions) == 0) of_x += kPositions;
  }
};

// Calls set(number, image, row, column) for kPositions positions from one on; number counts from 0.
template <typename Set>
INLINE void ForPositions(const Grid& grid, int64_t begin, const Set& set) {
  int64_t image = begin / grid.image, row = begin % grid.image / grid.period, column = begin % grid.period;
  for (int64_t number = 0; number < kPositions; ++number) {
    set(number, image, row, column);
    if (++column == grid.period) {
      column = 0;
      if (++row == grid.image / grid.period) {
        row = 0;
        ++image;
      }
    }
  }
}

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")

// The first `channels` of 32 numbers.
INLINE __mmask32 First(int64_t channels) { return channels >= 32 ? 0xffffffffu : (1u << channels) - 1; }

// Writes 32 positions of a phase of x, from position `begin` of the band on, into turned[in()][band.of_x]. `zeros` are as
// many as channels. The channels that fill up the last tile become zeros.
inline void LayOutTurned(const Convolution& of, const Grid& grid, const Band& band, int64_t phase, int64_t begin,
                         const Bits* x, const Bits* zeros, Bits* turned) {
  const int64_t phase_row = phase / of.phases_wide(), phase_column = phase % of.phases_wide();
  const int64_t height = of.read_height(), width = of.read_width();
  const Bits* pixels[kPositions];
  ForPositions(grid, band.begin + begin, [&](int64_t number, int64_t image, int64_t row, int64_t column) {
    const int64_t y = row * of.stride + phase_row - of.top, at = column * of.stride + phase_column - of.left;
    const bool inside = image < of.images && y >= 0 && y < height && at >= 0 && at < width;
    pixels[number] = inside ? x + ((image * of.height + y) * of.width + at) * of.pixel : zeros;
  });
  for (int64_t channel = 0; channel < of.channels_in; channel += 32) {
    const __mmask32 mask = First(of.channels_in - channel);
    __m512i low[16], high[16];  // pairs of positions; channels 0 to 3 of each 8, and 4 to 7
#pragma GCC unroll 16
    for (int pair = 0; pair < 16; ++pair) {
      const __m512i even = _mm512_maskz_loadu_epi16(mask, pixels[2 * pair] + channel);
      const __m512i odd = _mm512_maskz_loadu_epi16(mask, pixels[2 * pair + 1] + channel);
      low[pair] = _mm512_unpacklo_epi16(even, odd);
      high[pair] = _mm512_unpackhi_epi16(even, odd);
    }
    Turn(low);
    Turn(high);
    Bits* const to = turned + channel * band.of_x + begin;
    const int lanes = of.in() - channel > kTile ? 4 : 2;
    for (int lane = 0; lane < lanes; ++lane) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        _mm512_storeu_si512(to + (8 * lane + i) * band.of_x, low[4 * lane + i]);
        _mm512_storeu_si512(to + (8 * lane + 4 + i) * band.of_x, high[4 * lane + i]);
      }
    }
  }
}

// Writes 32 positions of dy, from position `begin` of the band on, into paired[out() / 16][band.of_dy / 2][16][2].
inline void LayOutPaired(const Convolution& of, const Grid& grid, const Band& band, int64_t begin, const Bits* dy,
                         const Bits* zeros, Bits* paired) {
  const Bits* pixels[kPositions];
  ForPositions(grid, band.begin + begin, [&](int64_t number, int64_t image, int64_t row, int64_t column) {
    const bool inside = image < of.images && row < of.out_height && column < of.out_width;
    pixels[number] = inside ? dy + ((image * of.out_height + row) * of.out_width + column) * of.channels_out : zeros;
  });
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int64_t channel = 0; channel < of.channels_out; channel += 32) {
    const __mmask32 mask = First(of.channels_out - channel);
    Bits* const to = paired + channel * band.of_dy + begin * kTile;
    const bool both = of.out() - channel > kTile;
#pragma GCC unroll 4
    for (int pair = 0; pair < 16; ++pair) {
      const __m512i even = _mm512_maskz_loadu_epi16(mask, pixels[2 * pair] + channel);
      const __m512i odd = _mm512_maskz_loadu_epi16(mask, pixels[2 * pair + 1] + channel);
      const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
      _mm512_storeu_si512(to + pair * 32, _mm512_permutex2var_epi64(low, first, high));
      if (both) {
        Bits* const next = to + kTile * band.of_dy;
        _mm512_storeu_si512(next + pair * 32, _mm512_permutex2var_epi64(low, second, high));
      }
    }
  }
}

#pragma GCC pop_options

}  // namespace hpctrain

#endif  // HPCTRAIN_NATIVE_KERNEL_GRAD_H_
