// Which parts of a fixed range of bytes are free.
#pragma once

#include <cstdint>
#include <iterator>
#include <map>
#include <optional>

namespace expertd {

// Hands out parts of `begin` to `end`, the first that fits; neighbours that are given back grow together again. Not for
// several threads at once.
class FreeList {
 public:
  FreeList(uint64_t begin, uint64_t end) {
    if (begin < end) gaps_.emplace(begin, end);
  }

  // Where `length` bytes are now taken; nothing when no gap is long enough.
  std::optional<uint64_t> take(uint64_t length) {
    for (auto gap = gaps_.begin(); gap != gaps_.end(); ++gap) {
      const auto [begin, end] = *gap;
      if (end - begin < length) continue;
      gaps_.erase(gap);
      if (end - begin > length) gaps_.emplace(begin + length, end);
      return begin;
    }
    return std::nullopt;
  }

  void give_back(uint64_t begin, uint64_t length) {
    uint64_t end = begin + length;
    const auto after = gaps_.lower_bound(begin);
    if (after != gaps_.begin()) {
      if (const auto before = std::prev(after); before->second == begin) {
        begin = before->first;
        gaps_.erase(before);
      }
    }
    if (after != gaps_.end() && after->first == end) {
      end = after->second;
      gaps_.erase(after);
    }
    gaps_.emplace(begin, end);
  }

  uint64_t free_bytes() const {
    uint64_t bytes = 0;
    for (const auto& [begin, end] : gaps_) bytes += end - begin;
    return bytes;
  }

 private:
  std::map<uint64_t, uint64_t> gaps_;  // begin and end, none touching another
};

}  // namespace expertd
