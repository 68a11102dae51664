// Sums over the ranks of one host, and what they agree on before, through memory that they share.
//
// Part by part of the numbers, each rank copies its summands into the shared memory, adds everyone's of its own share
// of the part, and copies the others' sums from there. Sums take the place of summands, which the core that adds has in
// its cache: writing them elsewhere takes half as long again. What is under way fits into the cache, tensors are read
// and written where they lie, however many there are, and a rank that has to wait sleeps.

#ifndef HOROVOD_HOST_SUM_H
#define HOROVOD_HOST_SUM_H

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "host_barrier.h"
#include "host_share.h"
#include "mpi.h"

namespace horovod {
namespace common {

// A tensor, and where its sum goes, which may be the same place.
struct HostSumPiece {
  const float* input;
  float* output;
  int64_t count;
};

class HostSum {
public:
  // Collective over `host`, the ranks of a host, which is not freed before what is made. Returns nullptr on all of them
  // if they cannot share memory, are only one, or one has HOROVOD_HOST_SUM=0.
  static std::shared_ptr<HostSum> Create(MPI_Comm host) {
    std::shared_ptr<HostSum> made(new HostSum);
    made->host_ = host;
    MPI_Comm_rank(host, &made->rank_);
    MPI_Comm_size(host, &made->ranks_);
    const char* wish = std::getenv("HOROVOD_HOST_SUM");
    int works = made->ranks_ > 1 && made->Map() && !(wish && std::strcmp(wish, "0") == 0), works_everywhere = 0;
    MPI_Allreduce(&works, &works_everywhere, 1, MPI_INT, MPI_MIN, host);
    return works_everywhere ? made : nullptr;
  }

  HostSum(const HostSum&) = delete;
  HostSum& operator=(const HostSum&) = delete;

  ~HostSum() {
    if (memory_ != nullptr) {
      munmap(memory_, kPage + ranks_ * kRankBytes);
    }
  }

  // Sums the pieces over the ranks; each of them calls this with as many and as long ones. The order of the additions is
  // that of AddRanks. Returns whether all of this rank's summands are finite.
  bool Sum(const std::vector<HostSumPiece>& pieces) {
    int64_t count = 0;
    for (auto& piece : pieces) {
      count += piece.count;
    }
    Cursor summands(pieces), own(pieces), others(pieces);
    bool finite = true;
    for (int64_t start = 0; start < count; start += kPart) {
      const int64_t part = std::min(kPart, count - start);
      const int64_t first = Share(part, rank_), last = Share(part, rank_ + 1);
      const int turn = turn_ = 1 - turn_;
      auto give = [&](int64_t from, int64_t to) {
        summands.Walk(start + from, to - from, [&](const float* in, float*, int64_t at, int64_t n) {
          std::memcpy(Shared(rank_, turn) + from + at, in, n * sizeof(float));
          finite &= hpctrain::AllFinite(in, n); // while it is in the cache
        });
      };
      give(0, first);
      give(last, part);
      Meet();
      own.Walk(start + first, last - first, [&](const float* in, float* out, int64_t at, int64_t n) {
        finite &= Add(in, first + at, n, turn, out);
      });
      Meet();
      for (int rank = 0; rank < ranks_; ++rank) {
        if (rank != rank_) {
          const int64_t from = Share(part, rank);
          const float* sums = Shared(Keeper(rank), turn) + from;
          others.Walk(start + from, Share(part, rank + 1) - from, [&](const float*, float* out, int64_t at, int64_t n) {
            std::memcpy(out, sums + at, n * sizeof(float));
          });
        }
      }
    }
    return finite;
  }

  // Clears the bits that are not set on all ranks. Returns false, on all of them, if there are too many.
  bool And(long long* bits, int count) {
    if (count > int(kPart * sizeof(float) / sizeof(*bits))) {
      return false;
    }
    const int turn = turn_ = 1 - turn_;
    std::memcpy(Shared(rank_, turn), bits, count * sizeof(*bits));
    Meet();
    for (int rank = 0; rank < ranks_; ++rank) {
      const long long* theirs = (const long long*)Shared(rank, turn);
      for (int i = 0; i < count; ++i) {
        bits[i] &= theirs[i];
      }
    }
    return true;
  }

private:
  static constexpr int64_t kPart = (1 << 18) / sizeof(float); // numbers under way at a time
  static constexpr size_t kPage = 4096;

  // Walks over ranges of the pieces as if they lay end to end; each range begins where the last one ended or later.
  class Cursor {
  public:
    explicit Cursor(const std::vector<HostSumPiece>& pieces) : piece_(pieces.begin()) {}

    // Calls visit(input, output, at, n) for each stretch in one piece: `n` numbers, `at` after `start`.
    template <typename Visit> void Walk(int64_t start, int64_t count, Visit visit) {
      for (int64_t at = 0; at < count;) {
        while (start + at >= begin_ + piece_->count) {
          begin_ += piece_->count;
          ++piece_;
        }
        int64_t inside = start + at - begin_;
        int64_t n = std::min(count - at, piece_->count - inside);
        visit(piece_->input + inside, piece_->output + inside, at, n);
        at += n;
      }
    }

  private:
    std::vector<HostSumPiece>::const_iterator piece_;
    int64_t begin_ = 0; // of the piece, among all numbers
  };

  HostSum() = default;

  // Where a rank's share of a part of that many numbers begins.
  int64_t Share(int64_t part, int rank) const { return hpctrain::BeginOfShare(part, rank, ranks_); }

  // A rank's shared memory: its summands of a part and of the next one, which then become sums.
  static constexpr size_t kRankBytes = 2 * kPart * sizeof(float);

  float* Shared(int rank, int turn) const { return (float*)(memory_ + kPage + rank * kRankBytes) + turn * kPart; }

  // The rank in whose memory are the sums of a rank's share: not itself, as its own summands of it are not there.
  int Keeper(int rank) const { return (rank ^ 1) < ranks_ ? rank ^ 1 : rank - 1; }

  void Meet() {
    ((hpctrain::HostBarrier*)memory_)->Wait(ranks_, [this] {
      // MPI may have kept back a part of what this rank sent last, which the one that is waited for may wait for.
      int found;
      MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, host_, &found, MPI_STATUS_IGNORE);
    });
  }

  // Writes the sums over ranks of `count` numbers to `out` and to the keeper's memory: this rank's are `in`, the others'
  // are in their memory from `at` on. Returns whether this rank's are finite.
  bool Add(const float* in, int64_t at, int64_t count, int turn, float* out) {
    bool finite = true;
    for (int64_t start = 0; start < count; start += hpctrain::kBlock) {
      const int64_t n = std::min(hpctrain::kBlock, count - start);
      finite &= hpctrain::AllFinite(in + start, n);
      auto summands = [&](int rank) { return (rank == rank_ ? in : Shared(rank, turn) + at) + start; };
      hpctrain::AddRanks(ranks_, summands, n, out + start, Shared(Keeper(rank_), turn) + at + start);
    }
    return finite;
  }

  // Maps memory of the host's first rank. It has no name in a file system, so nothing is left of a job that is killed.
  bool Map() {
    struct {
      int process, file;
      uint64_t token; // in case the others are in another process namespace, where the number is another process's
    } where = {getpid(), -1, 0};
    if (rank_ == 0) {
      where.file = (int)syscall(SYS_memfd_create, "horovod-sum", 1u); // closed on exec
      where.token = ((uint64_t)std::random_device()() << 32) | std::random_device()();
      if (where.file >= 0 && (ftruncate(where.file, kPage + ranks_ * kRankBytes) != 0 ||
                              pwrite(where.file, &where.token, 8, kPage - 8) != 8)) {
        close(where.file);
        where.file = -1;
      }
    }
    MPI_Bcast(&where, sizeof(where), MPI_BYTE, 0, host_);
    int file = where.file;
    if (rank_ != 0 && file >= 0) {
      char path[64];
      std::snprintf(path, sizeof(path), "/proc/%d/fd/%d", where.process, where.file);
      file = open(path, O_RDWR | O_CLOEXEC);
    }
    uint64_t token = 0;
    // Each rank asks for its own part, which so is near to it, and here, as later it would be killed if there is none.
    if (file >= 0 && pread(file, &token, 8, kPage - 8) == 8 && token == where.token &&
        posix_fallocate(file, kPage + rank_ * kRankBytes, kRankBytes) == 0) {
      void* memory = mmap(nullptr, kPage + ranks_ * kRankBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
      memory_ = memory == MAP_FAILED ? nullptr : (char*)memory;
    }
    MPI_Barrier(host_); // the others have it open
    if (file >= 0) {
      close(file);
    }
    return memory_ != nullptr;
  }

  MPI_Comm host_ = MPI_COMM_NULL;
  int rank_ = 0;
  int ranks_ = 1;
  char* memory_ = nullptr;
  // Which half of each rank's memory is used now; the others may still read what was in the other half. When they have
  // met again they are done with that.
  int turn_ = 0;
};

} // namespace common
} // namespace horovod

#endif // HOROVOD_HOST_SUM_H
