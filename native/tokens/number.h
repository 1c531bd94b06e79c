// Floating-point formats, converted with integer operations that every instruction set does alike.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "base/instructions.h"
#include "tokens/block.h"
#include "tokens/rows.h"

namespace expertd {

// Of `float8`, E4M3, a value is what is stored times the scale of its block.
enum class Format { bfloat16, float16, float32, float8 };

constexpr std::size_t size_of(Format format) noexcept {
  return format == Format::float32 ? 4 : format == Format::float8 ? 1 : 2;
}

struct Float32 {
  using Stored = float;
  static EXPERTD_INLINE float widen(float stored) noexcept { return stored; }
  static EXPERTD_INLINE float narrow(float value) noexcept { return value; }
};

struct BFloat16 {
  using Stored = std::uint16_t;
  static EXPERTD_INLINE float widen(std::uint16_t stored) noexcept {
    return std::bit_cast<float>(std::uint32_t{stored} << 16);
  }
  // To nearest, ties to even; any NaN as torch writes it on x86. VCVTNEPS2BF16 would make zeros of denormal numbers.
  static EXPERTD_INLINE std::uint16_t narrow(float value) noexcept {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<std::uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0xffff : rounded);
  }
};

struct Float16 {
  using Stored = std::uint16_t;
  static EXPERTD_INLINE float widen(std::uint16_t stored) noexcept {
    const std::uint32_t magnitude = std::uint32_t{stored & 0x7fffu} << 13;
    // The exponent's bias by a multiplication, which is exact and makes denormal numbers normal.
    const auto finite = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
    const std::uint32_t other = magnitude | 0x7f800000 | (magnitude > 0x7c00u << 13 ? 0x00400000 : 0);
    return std::bit_cast<float>((magnitude < 0x7c00u << 13 ? finite : other) | std::uint32_t{stored & 0x8000u} << 16);
  }
};

struct Float8 {
  using Stored = std::uint8_t;
  static EXPERTD_INLINE float widen(std::uint8_t stored) noexcept {
    const std::uint32_t magnitude = std::uint32_t{stored & 0x7fu} << 20;
    // As for Float16; NaN is the only value beyond the finite ones.
    const auto finite = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) * 0x1p120f);
    return std::bit_cast<float>((magnitude < 0x7fu << 20 ? finite : 0x7ff00000u) | std::uint32_t{stored & 0x80u} << 24);
  }
};

// E4M3 without infinities, of a value up to 448 * (1 + 2^-23): to nearest, ties to even; NaN keeps its sign. Signed, as
// SSE2 and AVX2 compare only such integers.
EXPERTD_INLINE std::uint8_t to_float8(float value) noexcept {
  const auto bits = std::bit_cast<std::int32_t>(value);
  const std::int32_t magnitude = bits & 0x7fffffff;
  // Rounded at bit 20, the last of three bits of mantissa, with the bias of 7 in place of 127.
  const std::int32_t normal = (magnitude - (120 << 23) + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  // Below 2^-6 the addition rounds: at 2^14 one bit is 2^-9, the least denormal number.
  const std::int32_t denormal = std::bit_cast<std::int32_t>(std::bit_cast<float>(magnitude) + 0x1p14f) - (141 << 23);
  const std::int32_t finite = magnitude < 121 << 23 ? denormal : normal;
  return static_cast<std::uint8_t>((magnitude < 0x43f00000 ? finite : 0x7f) | (bits >> 24 & 0x80));
}

}  // namespace expertd
