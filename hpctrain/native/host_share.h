// Which part of a variable is a rank's, and how a rank adds up what the ranks of a host have of it. Horovod is built with
// this file as well.

#ifndef HPCTRAIN_NATIVE_HOST_SHARE_H_
#define HPCTRAIN_NATIVE_HOST_SHARE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "each_cpu.h"

namespace hpctrain {

constexpr int64_t kLine = 64 / sizeof(float);  // of a cache line, which a core has alone or not at all
constexpr int64_t kBlock = 2048;               // numbers added at a time, which stay in the first cache

// Where share number `share` of `count` numbers begins. Shares are whole cache lines, about as many each.
inline int64_t BeginOfShare(int64_t count, int share, int shares) {
  const int64_t lines = (count + kLine - 1) / kLine;
  return std::min(count, lines * share / shares * kLine);
}

// sum = also = left + right, `count` numbers; all four may be the same memory.
FOR_EACH_CPU static void AddTwo(const float* left, const float* right, int64_t count, float* sum, float* also) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const float both = left[i] + right[i];
    sum[i] = both;
    also[i] = both;
  }
}

// Whether none of the numbers is NaN or infinite.
FOR_EACH_CPU static bool AllFinite(const float* numbers, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, numbers + i, sizeof(bits));
    largest = std::max(largest, bits & 0x7fffffff);
  }
  return largest < 0x7f800000;
}

// Writes the sums of what `ranks` (at least 2) ranks have to `sum` and to `also`: at most kBlock numbers, of each rank
// summands(rank) points to the first. The order of additions depends on nothing but the number of ranks; for a power of
// two it is the balanced tree over neighbors.
template <typename Summands>
void AddRanks(int ranks, Summands summands, int64_t count, float* sum, float* also) {
  constexpr int kLevels = 16;  // of additions, so for up to 2^16 ranks
  float partial[kLevels][kBlock];
  const float* pending[kLevels + 1];  // summands and partial sums to be added yet, each of more ranks than the next
  int top = 0;
  auto add_last_two = [&](float* into, float* into_also) {
    AddTwo(pending[top - 2], pending[top - 1], count, into, into_also);
    pending[--top - 1] = into;
  };
  for (int rank = 0; rank < ranks; ++rank) {
    pending[top++] = summands(rank);
    for (int rest = rank; rest & 1 && !(rank == ranks - 1 && top == 2); rest >>= 1) {
      add_last_two(partial[top - 2], partial[top - 2]);
    }
  }
  while (top > 2) add_last_two(partial[top - 2], partial[top - 2]);
  add_last_two(sum, also);
}

}  // namespace hpctrain

#endif  // HPCTRAIN_NATIVE_HOST_SHARE_H_
