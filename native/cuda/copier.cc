#include "cuda/copier.h"

#include <cstring>

#include "base/pool.h"

namespace expertd::cuda {

void Copy::make() const noexcept {
  if (!from) {
    std::memset(to, fill, bytes);
  } else if (!row) {
    std::memcpy(to, from, bytes);
  } else {
    auto source = static_cast<const uint8_t*>(from);
    auto target = static_cast<uint8_t*>(to), end = target + bytes;
    for (; target < end; target += padded_row, source += row) {
      std::memcpy(target, source, row);
      std::memset(target + row, fill, padded_row - row);
    }
  }
}

void PoolCopier::start(const std::vector<Copy>& copies, std::atomic<bool>* done) {
  Pool::of_process().post([self = shared_from_this(), &copies, done] {
    for (const Copy& copy : copies) copy.make();
    done->store(true, std::memory_order_release);
    self->tell();
  });
}

}  // namespace expertd::cuda
