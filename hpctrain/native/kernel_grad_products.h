// The products of kernel_grad.h by the matrix instructions of AMX, and by the vector instructions of AVX512_BF16.
//
// Both multiply tiles: 16 numbers of `in` times 32 positions with 32 positions times 16 numbers of `out`. Each number of
// the gradient is summed up in an order that positions alone decide, whatever is computed beside it.

#ifndef HPCTRAIN_NATIVE_KERNEL_GRAD_PRODUCTS_H_
#define HPCTRAIN_NATIVE_KERNEL_GRAD_PRODUCTS_H_

#include <cstring>

#include "kernel_grad.h"

namespace hpctrain {

// sums[i * bs + j][16][16] = or += a[i][16][positions] * b[j][positions / 2][16][2] for i < as, j < bs. Rows of sums and of
// a are sums_row and a_row numbers apart.
using MultiplyTiles = void (*)(const Bits* const* a, int64_t a_row, const Bits* const* b, int64_t positions,
                               float* const* sums, int64_t sums_row, bool adding);

// Bands begin at multiples of so many positions, so that what is added in a row is the same wherever they begin.
constexpr int64_t kInARow = 128;
static_assert(kInARow % kPositions == 0, "tiles have kPositions");

// ---------------------------------------------------------------- AMX

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")

// The registers of tiles are all of 16 rows of 64 bytes while one of these lives, on its thread.
class AmxTiles {
 public:
  AmxTiles() {
    alignas(64) Configuration whole = {};
    whole.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      whole.bytes[tile] = 64;
      whole.rows[tile] = 16;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(whole) : "memory");
  }
  ~AmxTiles() { __asm__ volatile("tilerelease" ::: "memory"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

 private:
  struct Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
};

// A product waits for the one before that adds to the same tile, so four sums at a time are several times as fast as one.
template <int as, int bs>
inline void MultiplyAmx(const Bits* const* a, int64_t a_row, const Bits* const* b, int64_t positions, float* const* sums,
                        int64_t sums_row, bool adding) {
  static_assert(as * bs <= 4 && bs <= 2, "tiles 0 to 3 are for sums, 4 and 5 for a, 6 and 7 for b");
  constexpr int kSums = as * bs;
  const int64_t of_sums = sums_row * sizeof(float), of_a = a_row * sizeof(Bits);
  if (adding) {
    _tile_loadd(0, sums[0], of_sums);
    if constexpr (kSums > 1) _tile_loadd(1, sums[1], of_sums);
    if constexpr (kSums > 2) _tile_loadd(2, sums[2], of_sums);
    if constexpr (kSums > 3) _tile_loadd(3, sums[3], of_sums);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t position = 0; position < positions; position += kPositions) {
    _tile_loadd(6, b[0] + position * kTile, 64);
    if constexpr (bs == 2) _tile_loadd(7, b[1] + position * kTile, 64);
    _tile_loadd(4, a[0] + position, of_a);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (bs == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (as > 1) {
      _tile_loadd(5, a[1] + position, of_a);
      if constexpr (bs == 2) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      } else {
        _tile_dpbf16ps(1, 5, 6);
      }
    }
    if constexpr (as > 2) {
      _tile_loadd(4, a[2] + position, of_a);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (as > 3) {
      _tile_loadd(5, a[3] + position, of_a);
      _tile_dpbf16ps(3, 5, 6);
    }
  }
  _tile_stored(0, sums[0], of_sums);
  if constexpr (kSums > 1) _tile_stored(1, sums[1], of_sums);
  if constexpr (kSums > 2) _tile_stored(2, sums[2], of_sums);
  if constexpr (kSums > 3) _tile_stored(3, sums[3], of_sums);
}

struct Amx {
  using Scope = AmxTiles;
  static constexpr int64_t kRoom = 384 * 1024;  // numbers that are laid out for each thread: they stay in 2 MB of cache
  template <int as, int bs>
  static constexpr MultiplyTiles kMultiply = MultiplyAmx<as, bs>;
};

#pragma GCC pop_options

// ---------------------------------------------------------------- AVX512_BF16

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bf16")

// `rows` rows of a tile of sums, and those of the one beside it if bs is 2.
template <int rows, int bs>
inline void MultiplyRows(const Bits* a, int64_t a_row, const Bits* const* b, int64_t positions, float* const* sums,
                         int64_t sums_row, bool adding) {
  __m512 totals[rows][bs];
#pragma GCC unroll 16
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 2
    for (int j = 0; j < bs; ++j) totals[row][j] = _mm512_setzero_ps();
  }
  for (int64_t position = 0; position < positions; position += 2) {
    __m512bh of_b[bs];
#pragma GCC unroll 2
    for (int j = 0; j < bs; ++j) of_b[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b[j] + position * kTile));
#pragma GCC unroll 16
    for (int row = 0; row < rows; ++row) {
      int32_t pair;  // maybe not aligned
      std::memcpy(&pair, a + row * a_row + position, sizeof(pair));
      const __m512bh of_a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 2
      for (int j = 0; j < bs; ++j) totals[row][j] = _mm512_dpbf16_ps(totals[row][j], of_a, of_b[j]);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 2
    for (int j = 0; j < bs; ++j) {
      float* const to = sums[j] + row * sums_row;
      _mm512_storeu_ps(to, adding ? _mm512_add_ps(_mm512_loadu_ps(to), totals[row][j]) : totals[row][j]);
    }
  }
}

// 16 of the 32 registers hold sums: as many products are under way as the instructions need. Of kInARow positions at a
// time, which stay in the nearest cache; and fewer numbers in a row are added with smaller errors.
template <int as, int bs>
inline void MultiplyAvx512(const Bits* const* a, int64_t a_row, const Bits* const* b, int64_t positions,
                           float* const* sums, int64_t sums_row, bool adding) {
  constexpr int kRows = kTile / bs;
  for (int64_t begin = 0; begin < positions; begin += kInARow) {
    const Bits* of_b[bs];
    for (int j = 0; j < bs; ++j) of_b[j] = b[j] + begin * kTile;
    const int64_t size = std::min(kInARow, positions - begin);
    for (int i = 0; i < as; ++i) {
      for (int row = 0; row < kTile; row += kRows) {
        float* of_rows[bs];
        for (int j = 0; j < bs; ++j) of_rows[j] = sums[i * bs + j] + row * sums_row;
        MultiplyRows<kRows, bs>(a[i] + row * a_row + begin, a_row, of_b, size, of_rows, sums_row, adding || begin > 0);
      }
    }
  }
}

struct Avx512 {
  struct Scope {};
  static constexpr int64_t kRoom = 192 * 1024;  // as there is 1 MB on processors that have these instructions alone
  template <int as, int bs>
  static constexpr MultiplyTiles kMultiply = MultiplyAvx512<as, bs>;
};

#pragma GCC pop_options

// ---------------------------------------------------------------- both

// Adds what a band has of up to two tiles of `in` and two of `out` channels, from these channels on, to
// dw[taps][in()][out()], or sets it. To be called while there is one of Instructions::Scope.
template <typename Instructions>
void MultiplyChannels(const Convolution& of, const Grid& grid, const Band& band, int64_t in, int64_t out,
                      const Bits* turned, const Bits* paired, bool adding, float* dw) {
  const int64_t high = std::min<int64_t>(2, (of.in() - in) / kTile), wide = std::min<int64_t>(2, (of.out() - out) / kTile);
  const int64_t all = of.kernel_height * of.kernel_width * high, most = 4 / wide;
  const Bits* b[2];
  for (int64_t j = 0; j < wide; ++j) b[j] = paired + (out + j * kTile) * band.of_dy;
  for (int64_t begin = 0; begin < all; begin += most) {
    const int64_t as = std::min(most, all - begin);
    const Bits* a[4];
    float* sums[4];
    for (int64_t i = 0; i < as; ++i) {
      const int64_t tap = (begin + i) / high, channel = in + (begin + i) % high * kTile;
      const int64_t row = tap / of.kernel_width, column = tap % of.kernel_width;
      const int64_t phase = row % of.stride * of.phases_wide() + column % of.stride;
      a[i] = turned + (phase * of.in() + channel) * band.of_x + grid.Ahead(of, row, column);
      for (int64_t j = 0; j < wide; ++j) sums[i * wide + j] = dw + (tap * of.in() + channel) * of.out() + out + j * kTile;
    }
    static constexpr MultiplyTiles kOne[] = {Instructions::template kMultiply<1, 1>, Instructions::template kMultiply<2, 1>,
                                             Instructions::template kMultiply<3, 1>, Instructions::template kMultiply<4, 1>};
    static constexpr MultiplyTiles kTwo[] = {Instructions::template kMultiply<1, 2>, Instructions::template kMultiply<2, 2>};
    (wide == 2 ? kTwo : kOne)[as - 1](a, band.of_x, b, band.of_dy, sums, of.out(), adding);
  }
}

}  // namespace hpctrain

#endif  // HPCTRAIN_NATIVE_KERNEL_GRAD_PRODUCTS_H_
