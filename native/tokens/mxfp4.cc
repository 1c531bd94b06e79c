#include "tokens/mxfp4.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

#include "tokens/block.h"
#include "tokens/number.h"

namespace expertd {
namespace {

constexpr std::size_t GROUP = 32, GROUP_BYTES = GROUP / 2, GROUPS = QUANTIZATION_BLOCK / GROUP;
constexpr int BIAS = 127, LEAST_SCALE = -126;
// The largest magnitude of a block is below 2^(TOP + 1) of its scale.
constexpr int TOP = 8;
// Exponents of groups, relative to the scale of their block: below LEAST all is rounded to zero, at MOST only the value
// 0.5 occurs. From EXACT on every value has its code.
constexpr int LEAST = -13, EXACT = -8, MOST = TOP + 1;
constexpr std::array<float, 8> MAGNITUDES = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
constexpr std::uint64_t EACH = 0x1111111111111111;

// Of each byte: its two values as E4M3, and how many of these are others.
struct Pairs {
  std::array<std::array<std::uint8_t, 2>, 256> codes{};
  std::array<std::uint8_t, 256> inexact{};
};

Pairs pairs_at(int exponent) {
  Pairs pairs;
  for (std::size_t byte = 0; byte < 256; ++byte)
    for (std::size_t half = 0; half < 2; ++half) {
      const std::size_t code = byte >> 4 * half & 15;
      const float value = std::ldexp(MAGNITUDES[code & 7], exponent);
      const std::uint8_t rounded = to_float8(code & 8 ? -value : value);
      pairs.codes[byte][half] = rounded;
      pairs.inexact[byte] += std::fabs(Float8::widen(rounded)) != value;
    }
  return pairs;
}

const Pairs& pairs_of(int exponent) {
  static const auto all = [] {
    std::array<Pairs, MOST - LEAST + 1> made;
    for (int one = LEAST; one <= MOST; ++one) made[static_cast<std::size_t>(one - LEAST)] = pairs_at(one);
    return made;
  }();
  return all[static_cast<std::size_t>(std::clamp(exponent, LEAST, MOST) - LEAST)];
}

// The exponent of the largest of 32 magnitudes, or NONE where all are zero. All but the sign are looked at, 16 a word.
constexpr int NONE = -(1 << 20);
EXPERTD_INLINE int largest_exponent(const std::byte* packed) noexcept {
  const auto low = load<std::uint64_t>(packed, 0), high = load<std::uint64_t>(packed, 1);
  const std::uint64_t both = low | high;
  if (((low & low << 1) | (high & high << 1)) & EACH * 4) return 2;
  if (both & EACH * 4) return 1;
  if (both & EACH * 2) return 0;
  return both & EACH ? -1 : NONE;
}

struct Block {
  const std::byte* packed;
  const std::byte* exponents;
  std::byte* out;
};

// Its scale's exponent.
template <typename At>
int scale_exponent(const At& at) noexcept {
  int top = NONE;
  for (std::size_t row = 0; row < QUANTIZATION_BLOCK; ++row) {
    const Block here = at(row);
    for (std::size_t group = 0; group < GROUPS; ++group) {
      const int exponent = static_cast<int>(here.exponents[group]) - BIAS;
      top = std::max(top, exponent + largest_exponent(here.packed + group * GROUP_BYTES));
    }
  }
  return top < NONE / 2 ? NONE : std::max(top - TOP, LEAST_SCALE);
}

// How many weights are not what was stored.
template <typename At>
std::size_t convert_block(const At& at, int scale) noexcept {
  std::size_t inexact = 0;
  for (std::size_t row = 0; row < QUANTIZATION_BLOCK; ++row) {
    const Block here = at(row);
    for (std::size_t group = 0; group < GROUPS; ++group) {
      const int exponent = static_cast<int>(here.exponents[group]) - BIAS - scale;
      const Pairs& pairs = pairs_of(exponent);
      const std::byte* packed = here.packed + group * GROUP_BYTES;
      for (std::size_t i = 0; i < GROUP_BYTES; ++i)
        store(here.out + group * GROUP, i, pairs.codes[static_cast<std::size_t>(packed[i])]);
      if (exponent < EXACT)
        for (std::size_t i = 0; i < GROUP_BYTES; ++i) inexact += pairs.inexact[static_cast<std::size_t>(packed[i])];
    }
  }
  return inexact;
}

}  // namespace

Converted convert_mxfp4(Rows packed, Rows exponents, std::size_t rows, std::size_t columns, WritableRows out,
                        WritableRows scales) noexcept {
  Converted all{0, false};
  for (std::size_t i = 0; i < rows / QUANTIZATION_BLOCK; ++i)
    for (std::size_t j = 0; j < columns / QUANTIZATION_BLOCK; ++j) {
      const auto at = [&](std::size_t row) noexcept {
        const std::size_t here = i * QUANTIZATION_BLOCK + row;
        return Block{packed[here] + j * GROUPS * GROUP_BYTES, exponents[here] + j * GROUPS,
                     out[here] + j * QUANTIZATION_BLOCK};
      };
      const int scale = scale_exponent(at);
      store(scales[i], j, scale == NONE ? 1.0f : std::ldexp(1.0f, scale));
      all.inexact += convert_block(at, scale == NONE ? 0 : scale);
      all.any = all.any || scale != NONE;
    }
  return all;
}

}  // namespace expertd
