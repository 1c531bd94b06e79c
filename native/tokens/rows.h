// Matrices in memory that belongs to the caller, who keeps it alive and unchanged during a call.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "base/instructions.h"
#include "base/pool.h"

namespace expertd {

// Elements of a row lie side by side; nothing is aligned.
template <typename Byte>
struct RowsOf {
  Byte* data;
  std::ptrdiff_t stride;  // bytes from one row to the next, of any sign

  Byte* operator[](std::size_t row) const noexcept { return data + static_cast<std::ptrdiff_t>(row) * stride; }
};
using Rows = RowsOf<const std::byte>;
using WritableRows = RowsOf<std::byte>;

// memcpy, since tensors in messages lie at any address: compilers make one instruction of it.
template <typename Value>
EXPERTD_INLINE Value load(const std::byte* from, std::size_t index = 0) noexcept {
  Value value;
  std::memcpy(&value, from + index * sizeof value, sizeof value);
  return value;
}

template <typename Value>
EXPERTD_INLINE void store(std::byte* to, std::size_t index, Value value) noexcept {
  std::memcpy(to + index * sizeof value, &value, sizeof value);
}

// Bytes for which waking another thread pays, and for which one that is awake does; and of more than one huge page, so
// that threads do not clear the same one for memory that is used for the first time.
constexpr std::size_t PIECE_BYTES = 256 << 10, AWAKE_PIECE_BYTES = 64 << 10, MOST_PIECE_BYTES = 8 << 20;

// Calls `work(first, end)` for runs of rows that together are all `rows`, on the pool where they are large. `row_bytes`
// are those of what is quantised; of what is done faster, fewer: to wake a thread that has little to do costs more.
template <typename Work>
void spread(std::size_t rows, std::size_t row_bytes, const Work& work) {
  // Few rows, mostly: the pool is not looked at.
  if (rows <= AWAKE_PIECE_BYTES / (row_bytes + 1) + 1) return work(0, rows);
  Pool& pool = Pool::of_process();
  const std::size_t bytes = rows * row_bytes, least = pool.awake() ? AWAKE_PIECE_BYTES : PIECE_BYTES;
  const std::size_t run = std::clamp(bytes / (4 * pool.size()), least, MOST_PIECE_BYTES) / (row_bytes + 1) + 1;
  pool.run((rows + run - 1) / run, bytes / PIECE_BYTES,
           [&](std::size_t piece) noexcept { work(piece * run, std::min((piece + 1) * run, rows)); });
}

}  // namespace expertd
