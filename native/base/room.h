// Memory for results that are dropped and asked for again.
#pragma once

#include <cstddef>

namespace expertd {

// Some bytes with anything in them, aligned to 64. New memory of a size comes from the kernel page by page, cleared, at
// a few times what it costs to fill it; this is what an earlier room of about the size left, where there is one. The
// process keeps up to 512 MiB so. Any thread.
class Room {
 public:
  // Throws std::bad_alloc.
  explicit Room(std::size_t bytes);
  ~Room();
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;

  std::byte* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }

 private:
  std::byte* data_;
  std::size_t size_, capacity_;
};

}  // namespace expertd
