// Whether numbers are finite.
#pragma once

#include <cstddef>

#include "tokens/number.h"
#include "tokens/rows.h"

namespace expertd {

// Of `width` values of `format`, which is not float8: none of them is NaN or infinite.
bool all_finite(const std::byte* values, Format format, std::size_t width) noexcept;

}  // namespace expertd
