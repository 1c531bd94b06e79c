#include "base/room.h"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "base/owned.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace expertd {
namespace {

constexpr std::size_t kKeptBytes = 512 << 20;
constexpr std::size_t kHugePage = 2 << 20;

struct Block {
  std::byte* data;
  std::size_t bytes;
};

// What was left, the oldest first. A child made by fork takes nothing from it, as its lock may be held for ever.
class Left : public Owned {
 public:
  Block take(std::size_t bytes) {
    const std::lock_guard lock(lock_);
    // Not one of many times the size: it would be missed by who has that.
    const auto fits = [bytes](const Block& block) { return block.bytes >= bytes && block.bytes <= 2 * bytes; };
    const auto found = std::find_if(blocks_.rbegin(), blocks_.rend(), fits);
    if (found == blocks_.rend()) return {};
    const Block block = *found;
    blocks_.erase(std::next(found).base());
    kept_ -= block.bytes;
    return block;
  }

  void give(const Block& block) {
    std::vector<Block> freed;
    {
      const std::lock_guard lock(lock_);
      blocks_.push_back(block);
      for (kept_ += block.bytes; kept_ > kKeptBytes; blocks_.pop_front()) {
        kept_ -= blocks_.front().bytes;
        freed.push_back(blocks_.front());
      }
    }
    for (const Block& oldest : freed) std::free(oldest.data);
  }

  // Never destroyed: tensors may outlive every static object.
  static Left& of_process() {
    static auto* left = new Left;
    return *left;
  }

 private:
  std::mutex lock_;
  std::deque<Block> blocks_;
  std::size_t kept_ = 0;
};

Block allocate(std::size_t bytes) {
  const std::size_t alignment = bytes < kHugePage ? 64 : kHugePage;
  const std::size_t whole = (bytes + alignment - 1) / alignment * alignment;
  auto* data = static_cast<std::byte*>(std::aligned_alloc(alignment, whole));
  if (!data) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (alignment == kHugePage) madvise(data, whole, MADV_HUGEPAGE);  // where it fails, pages are small
#endif
  return {data, whole};
}

}  // namespace

Room::Room(std::size_t bytes) : size_(bytes) {
  Left& left = Left::of_process();
  Block block = left.here() ? left.take(bytes) : Block{};
  if (!block.data) block = allocate(bytes);
  data_ = block.data;
  capacity_ = block.bytes;
}

Room::~Room() {
  Left& left = Left::of_process();
  if (left.here())
    left.give({data_, capacity_});
  else
    std::free(data_);
}

}  // namespace expertd
