// Some rows of a matrix, side by side.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "tokens/rows.h"

namespace expertd {

// out[i] = source[indices[i]], rows of `row_bytes`. Throws std::out_of_range, before it writes, for an index that is
// not below `rows`.
void gather(Rows source, std::size_t rows, std::size_t row_bytes, std::span<const std::int64_t> indices,
            WritableRows out);

}  // namespace expertd
