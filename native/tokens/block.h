// How many consecutive values of FP8 share a scale.
#pragma once

#include <cstddef>

namespace expertd {

inline constexpr std::size_t QUANTIZATION_BLOCK = 128;

}  // namespace expertd
