// The instruction set that this process computes with, chosen once, and code compiled for each of them.
#pragma once

#include <optional>
#include <string_view>

#if defined(__x86_64__)
#define EXPERTD_X86 1
#elif defined(__aarch64__)
#define EXPERTD_ARM 1
#endif

// For what `compiled` runs: code that is not inlined would stay portable.
#define EXPERTD_INLINE __attribute__((always_inline)) inline
#define EXPERTD_INLINE_LAMBDA __attribute__((always_inline))

namespace expertd {

enum class Instructions { portable, sse42, avx2, avx512, armv8_crc };

// What the next computations use: the best that the processor has, unless `use` said otherwise.
Instructions instructions() noexcept;
std::string_view name(Instructions chosen) noexcept;

// For tests. False, changing nothing, where there is no such set or the processor lacks it.
bool use(std::string_view name) noexcept;

#ifdef EXPERTD_X86
// Attributes, not compiler flags: with flags the linker may keep an inline function's AVX-512 version for everybody.
template <typename Body>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) void compiled_for_avx512(const Body& body) {
  body();
}
template <typename Body>
__attribute__((target("avx2"))) void compiled_for_avx2(const Body& body) {
  body();
}
#endif

// Runs `body`, an EXPERTD_INLINE_LAMBDA that takes nothing, in the version for `instructions()`. One text, so one
// result: every operation is exact or rounds as IEEE 754 says, and the build forbids contraction to FMA.
template <typename Body>
void compiled(const Body& body) {
#ifdef EXPERTD_X86
  switch (instructions()) {
    case Instructions::avx512:
      return compiled_for_avx512(body);
    case Instructions::avx2:
      return compiled_for_avx2(body);
    default:
      break;
  }
#endif
  body();
}

}  // namespace expertd
