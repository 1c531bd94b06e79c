#include "engine/bell.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace expertd {

Bell::Bell() : fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
}

Bell::~Bell() { close(fd_); }

void Bell::disarm() {
  // Still armed: nobody has written.
  if (asleep_.exchange(false, std::memory_order_seq_cst)) return;
  uint64_t count;
  // Nothing to read is as good as read.
  [[maybe_unused]] const ssize_t got = read(fd_, &count, sizeof count);
}

void Bell::ring() {
  if (!asleep_.exchange(false, std::memory_order_seq_cst)) return;
  const uint64_t one = 1;
  // Cannot fail: the counter is far from its limit, since who swaps the flag writes once.
  [[maybe_unused]] const ssize_t put = write(fd_, &one, sizeof one);
}

}  // namespace expertd
