// Bytes from one place to another, on the pool where they are many.
#pragma once

#include <cstddef>

namespace expertd {

// The places do not overlap. What is more than the caches hold is written past them.
void copy(const std::byte* from, std::size_t bytes, std::byte* to);

}  // namespace expertd
