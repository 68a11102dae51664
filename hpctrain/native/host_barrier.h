// Where the processes of one host wait for each other, in memory that they share. Horovod is built with this file as well.

#ifndef HPCTRAIN_NATIVE_HOST_BARRIER_H_
#define HPCTRAIN_NATIVE_HOST_BARRIER_H_

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdint>
#include <thread>

namespace hpctrain {

// It lies in shared memory; zeros are its first state.
class HostBarrier {
 public:
  // Returns once `count` processes have called it. What any of them wrote before, all of them see after. Calls `meanwhile`
  // now and then as long as it takes.
  template <typename Meanwhile>
  void Wait(uint32_t count, Meanwhile meanwhile) {
    const uint32_t round = round_.load();
    if (arrived_.fetch_add(1) + 1 == count) {
      arrived_.store(0);
      round_.fetch_add(1);
      if (sleepers_.load() > 0) syscall(SYS_futex, &round_, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
      return;
    }
    // Going to sleep takes longer than most of these waits, so look for a while first. But what else wants this core, a
    // thread of this process or the very one that is waited for, gets it with the first yield.
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
    do {
      for (int i = 0; i < 100; ++i) {
        if (round_.load() != round) return;
      }
      std::this_thread::yield();
    } while (std::chrono::steady_clock::now() < until);
    sleepers_.fetch_add(1);
    while (round_.load() == round) {
      static_assert(sizeof(round_) == 4, "the kernel compares 32 bits; it returns at once if the round is another one");
      const timespec at_most = {0, 50000000};
      if (syscall(SYS_futex, &round_, FUTEX_WAIT, round, &at_most, nullptr, 0) != 0 && errno == ETIMEDOUT) meanwhile();
    }
    sleepers_.fetch_sub(1);
  }

 private:
  alignas(64) std::atomic<uint32_t> arrived_;
  alignas(64) std::atomic<uint32_t> round_;
  alignas(64) std::atomic<uint32_t> sleepers_;
};

}  // namespace hpctrain

#endif  // HPCTRAIN_NATIVE_HOST_BARRIER_H_
