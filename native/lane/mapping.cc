#include "lane/mapping.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace expertd {
namespace {

constexpr size_t kStep = size_t{64} << 20;
#ifndef MADV_POPULATE_WRITE
constexpr int MADV_POPULATE_WRITE = 23;
#endif

// MAP_POPULATE would keep all other threads from mapping anything until it is done.
int populate(std::byte* base, size_t size) {
  for (size_t at = 0; at < size; at += kStep) {
    if (madvise(base + at, std::min(kStep, size - at), MADV_POPULATE_WRITE) == 0) continue;
    // Kernels before 5.14 do not know it: pages come when they are used.
    return errno == EINVAL ? 0 : errno;
  }
  return 0;
}

}  // namespace

Mapping::Mapping(int descriptor, size_t size) : size_(size) {
  void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (at == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  base_ = static_cast<std::byte*>(at);
  try {
    guard_ = std::make_unique<FaultGuard>(base_, size);
    madvise(base_, size, MADV_DONTFORK);
    if (const int error = populate(base_, size)) throw std::system_error(error, std::generic_category(), "madvise");
  } catch (...) {
    guard_.reset();
    munmap(base_, size);
    throw;
  }
}

void Mapping::close() {
  guard_.reset();
  // A forked child never had it, and may have something else there.
  if (!here()) return;
  for (size_t at = 0; at < size_; at += kStep) munmap(base_ + at, std::min(kStep, size_ - at));
  size_ = 0;
}

}  // namespace expertd
