// What happens on a page of shared memory that cannot be had: a zero page, and a broken lane.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace expertd {

// While it lives, an access in [base, base + size) that the kernel cannot serve (SIGBUS: a page of a memfd that cannot
// be had) finds a page of zeros of this process's own instead, and `broken` is true from then on. Any thread. The
// handler is put before the one that is there when the first guard is made, and hands on all other faults.
class FaultGuard {
 public:
  // Throws std::runtime_error when there are too many.
  FaultGuard(std::byte* base, size_t size);
  // No thread uses the memory any more.
  ~FaultGuard();
  FaultGuard(const FaultGuard&) = delete;
  FaultGuard& operator=(const FaultGuard&) = delete;

  bool broken() const;

 private:
  struct Range;
  friend struct FaultTable;
  Range* range_;
};

}  // namespace expertd
