#include "tokens/gather.h"

#include <stdexcept>
#include <string>

namespace expertd {

void gather(Rows source, std::size_t rows, std::size_t row_bytes, std::span<const std::int64_t> indices,
            WritableRows out) {
  for (const std::int64_t index : indices)
    if (static_cast<std::uint64_t>(index) >= rows)
      throw std::out_of_range("row " + std::to_string(index) + " of " + std::to_string(rows));
  // A core copies several times what it computes with.
  spread(indices.size(), row_bytes / 4, [=](std::size_t first, std::size_t end) noexcept {
    for (std::size_t i = first; i < end; ++i)
      std::memcpy(out[i], source[static_cast<std::size_t>(indices[i])], row_bytes);
  });
}

}  // namespace expertd
