// Shared memory, mapped here.
#pragma once

#include <cstddef>
#include <memory>

#include "base/owned.h"
#include "lane/fault.h"

namespace expertd {

// A memfd, mapped to read and write; unmapped with the object. Not inherited by forked children, and safe against
// faults.
class Mapping : public Owned {
 public:
  // Maps all of `size` bytes of a memfd that cannot shrink, and makes its pages present: 0.1 s for a few hundred MB, in
  // steps between which others may change the address space. The descriptor stays the caller's. Throws
  // std::system_error.
  Mapping(int descriptor, size_t size);
  ~Mapping() { close(); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  // Unmaps it, once nobody uses it any more: as long, and in steps, too.
  void close();

  std::byte* base() const { return base_; }
  size_t size() const { return size_; }
  // Whether a page was lost: what was read since may have been zeros, what was written may have gone nowhere.
  bool broken() const { return guard_ && guard_->broken(); }

 private:
  std::byte* base_;
  size_t size_;
  std::unique_ptr<FaultGuard> guard_;
};

}  // namespace expertd
