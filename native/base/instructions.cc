#include "base/instructions.h"

#include <array>
#include <atomic>
#include <cstdint>

#if defined(EXPERTD_X86)
#include <cpuid.h>
#elif defined(EXPERTD_ARM) && __has_include(<sys/auxv.h>)
#include <sys/auxv.h>
#endif

namespace expertd {
namespace {

constexpr std::array<std::string_view, 5> NAMES{"portable", "sse4.2", "avx2", "avx512", "armv8-crc"};

#if defined(EXPERTD_X86)

// Registers whose contents the operating system keeps for a thread (XCR0).
std::uint32_t kept_registers() noexcept {
  std::uint32_t low = 0;
  std::uint32_t high = 0;
  // Safe: called only where OSXSAVE says that the instruction exists.
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool has(Instructions wanted) noexcept {
  std::uint32_t a = 0;
  std::uint32_t b = 0;
  std::uint32_t c = 0;
  std::uint32_t d = 0;
  if (wanted == Instructions::portable) return true;
  if (wanted == Instructions::armv8_crc || !__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSE4_2)) return false;
  if (wanted == Instructions::sse42) return true;
  constexpr std::uint32_t YMM = 0x06;
  constexpr std::uint32_t ZMM = 0xe6;
  const std::uint32_t kept = c & bit_OSXSAVE ? kept_registers() : 0;
  if ((kept & YMM) != YMM || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return false;
  constexpr std::uint32_t AVX512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  return wanted == Instructions::avx2 || ((kept & ZMM) == ZMM && (b & AVX512) == AVX512);
}

#elif defined(EXPERTD_ARM)

bool has(Instructions wanted) noexcept {
  if (wanted != Instructions::armv8_crc) return wanted == Instructions::portable;
#if defined(__ARM_FEATURE_CRC32)
  return true;
#elif __has_include(<sys/auxv.h>)
  constexpr unsigned long CRC32 = 1UL << 7;  // HWCAP_CRC32, whose header is Linux's
  return getauxval(AT_HWCAP) & CRC32;
#else
  return false;
#endif
}

#else

bool has(Instructions wanted) noexcept { return wanted == Instructions::portable; }

#endif

Instructions best() noexcept {
  for (auto wanted : {Instructions::avx512, Instructions::avx2, Instructions::sse42, Instructions::armv8_crc})
    if (has(wanted)) return wanted;
  return Instructions::portable;
}

std::atomic<Instructions> chosen{best()};

}  // namespace

Instructions instructions() noexcept { return chosen.load(std::memory_order_relaxed); }

std::string_view name(Instructions set) noexcept { return NAMES[static_cast<std::size_t>(set)]; }

bool use(std::string_view wanted) noexcept {
  for (std::size_t index = 0; index < NAMES.size(); ++index) {
    const auto set = static_cast<Instructions>(index);
    if (NAMES[index] != wanted || !has(set)) continue;
    chosen.store(set, std::memory_order_relaxed);
    return true;
  }
  return false;
}

}  // namespace expertd
