#include "tokens/copy.h"

#include <algorithm>
#include <cstring>

#include "tokens/rows.h"
#include "tokens/stream.h"

namespace expertd {
namespace {

constexpr std::size_t RUN_BYTES = 64 << 10;

}  // namespace

void copy(const std::byte* from, std::size_t bytes, std::byte* to) {
  const bool past_caches = bytes >= STREAMED_BYTES;
  // A core copies several times what it quantises.
  spread((bytes + RUN_BYTES - 1) / RUN_BYTES, RUN_BYTES / 4, [=](std::size_t first, std::size_t end) noexcept {
    const std::size_t at = first * RUN_BYTES, size = std::min(end * RUN_BYTES, bytes) - at;
    if (!past_caches) {
      std::memcpy(to + at, from + at, size);
    } else {
      stream(to + at, from + at, size);
      end_streams();
    }
  });
}

}  // namespace expertd
