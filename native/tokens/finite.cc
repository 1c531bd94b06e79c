#include "tokens/finite.h"

#include <algorithm>
#include <bit>
#include <cstdint>

namespace expertd {
namespace {

template <typename Number>
bool all_finite(const std::byte* values, std::size_t width) noexcept {
  std::int32_t largest = 0;
  compiled([&]() EXPERTD_INLINE_LAMBDA {
    // Beside an own variable, which need not be in memory, the loop is vectorised.
    std::int32_t most = 0;
    for (std::size_t i = 0; i < width; ++i) {
      const float value = Number::widen(load<typename Number::Stored>(values, i));
      most = std::max(most, std::bit_cast<std::int32_t>(value) & 0x7fffffff);
    }
    largest = most;
  });
  return largest < 0x7f800000;
}

}  // namespace

bool all_finite(const std::byte* values, Format format, std::size_t width) noexcept {
  switch (format) {
    case Format::bfloat16:
      return all_finite<BFloat16>(values, width);
    case Format::float16:
      return all_finite<Float16>(values, width);
    case Format::float32:
      return all_finite<Float32>(values, width);
    case Format::float8:
      break;
  }
  return true;
}

}  // namespace expertd
