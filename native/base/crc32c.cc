#include "base/crc32c.h"

#include <array>
#include <bit>
#include <cstring>

#include "base/instructions.h"

#if defined(EXPERTD_X86)
#include <nmmintrin.h>
#define EXPERTD_CRC __attribute__((target("sse4.2,crc32")))
#elif defined(EXPERTD_ARM)
#include <arm_acle.h>
#define EXPERTD_CRC __attribute__((target("+crc")))
#endif

namespace expertd {
namespace {

constexpr std::uint32_t POLYNOMIAL = 0x82f63b78;  // bits reversed
using Table = std::array<std::array<std::uint32_t, 256>, 4>;

constexpr std::uint32_t after_zero_byte(std::uint32_t crc) {
  for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
  return crc;
}

constexpr std::uint32_t look_up(const Table& table, std::uint32_t crc) {
  return table[0][crc & 0xff] ^ table[1][crc >> 8 & 0xff] ^ table[2][crc >> 16 & 0xff] ^ table[3][crc >> 24];
}

// What four bytes of zeros make of a checksum, by the checksum's bytes. Also the checksum's step for four bytes.
constexpr Table FOUR_ZEROS = [] {
  Table table{};
  for (std::uint32_t byte = 0; byte < 256; ++byte)
    for (std::uint32_t place = 0, crc = byte; place < 4; ++place) table[3 - place][byte] = crc = after_zero_byte(crc);
  return table;
}();

// What `size` bytes of zeros, four times a power of two, make of a checksum.
Table zeros(std::size_t size) {
  Table table = FOUR_ZEROS;
  for (std::size_t done = 4; done < size; done *= 2) {
    Table twice{};
    for (std::size_t place = 0; place < 4; ++place)
      for (std::size_t byte = 0; byte < 256; ++byte) twice[place][byte] = look_up(table, table[place][byte]);
    table = twice;
  }
  return table;
}

template <typename Word>
EXPERTD_INLINE Word load(const std::byte* data) {
  Word word;
  std::memcpy(&word, data, sizeof word);
  return word;
}

std::uint32_t by_table(std::uint32_t crc, const std::byte* data, std::size_t size) noexcept {
  for (; std::endian::native == std::endian::little && size >= 4; data += 4, size -= 4)
    crc = look_up(FOUR_ZEROS, crc ^ load<std::uint32_t>(data));
  for (; size; ++data, --size) crc = crc >> 8 ^ FOUR_ZEROS[3][(crc ^ static_cast<std::uint32_t>(*data)) & 0xff];
  return crc;
}

#ifdef EXPERTD_CRC

EXPERTD_CRC EXPERTD_INLINE std::uint32_t step(std::uint32_t crc, const std::byte* data) {
#ifdef EXPERTD_X86
  return static_cast<std::uint32_t>(_mm_crc32_u64(crc, load<std::uint64_t>(data)));
#else
  return __crc32cd(crc, load<std::uint64_t>(data));
#endif
}

// The instruction takes three cycles and one can start in each: three stretches side by side, joined by what as many
// zeros as there are bytes in a stretch make of the checksum before it.
template <std::size_t STRETCH>
EXPERTD_CRC std::uint32_t by_threes(std::uint32_t crc, const std::byte*& data, std::size_t& size) noexcept {
  static const Table skip = zeros(STRETCH);
  for (; size >= 3 * STRETCH; data += 3 * STRETCH, size -= 3 * STRETCH) {
    std::uint32_t second = 0;
    std::uint32_t third = 0;
    for (std::size_t at = 0; at < STRETCH; at += 8) {
      crc = step(crc, data + at);
      second = step(second, data + STRETCH + at);
      third = step(third, data + 2 * STRETCH + at);
    }
    crc = look_up(skip, look_up(skip, crc) ^ second) ^ third;
  }
  return crc;
}

EXPERTD_CRC std::uint32_t by_instruction(std::uint32_t crc, const std::byte* data, std::size_t size) noexcept {
  crc = by_threes<4096>(crc, data, size);
  crc = by_threes<256>(crc, data, size);
  for (; size >= 8; data += 8, size -= 8) crc = step(crc, data);
  return by_table(crc, data, size);
}

#endif

}  // namespace

std::uint32_t crc32c(std::uint32_t before, const std::byte* data, std::size_t size) noexcept {
#ifdef EXPERTD_CRC
  if (instructions() != Instructions::portable) return ~by_instruction(~before, data, size);
#endif
  return ~by_table(~before, data, size);
}

}  // namespace expertd
