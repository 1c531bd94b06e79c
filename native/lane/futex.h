// Sleeping on a word of shared memory.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <ctime>

#include "base/clock.h"

namespace expertd {

// Futexes of memory that processes share. `word` is an aligned word of it; the kernel reads it itself, and no other.

// 0 when woken or when the word is not `value`, else EINTR or, after `deadline_ns` of the monotonic clock, ETIMEDOUT.
inline int futex_wait(std::byte* word, uint32_t value, int64_t deadline_ns) {
  const timespec deadline{deadline_ns / 1'000'000'000, deadline_ns % 1'000'000'000};
  if (syscall(SYS_futex, word, FUTEX_WAIT_BITSET, value, &deadline, nullptr, FUTEX_BITSET_MATCH_ANY) == 0) return 0;
  return errno == EAGAIN ? 0 : errno;
}

inline void futex_wake(std::byte* word, int threads = INT_MAX) {
  syscall(SYS_futex, word, FUTEX_WAKE, threads, nullptr, nullptr, 0);
}

}  // namespace expertd
