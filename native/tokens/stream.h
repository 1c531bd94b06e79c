// Stores past the caches: what is larger than they are would be read into them first, only to be overwritten.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/instructions.h"

#ifdef EXPERTD_X86
#include <emmintrin.h>
#endif

namespace expertd {

// Of a result, from which on it is stored so.
constexpr std::size_t STREAMED_BYTES = 16 << 20;

// Copies what is in the caches. Other threads may see it only after `end_streams`.
EXPERTD_INLINE void stream(std::byte* to, const std::byte* from, std::size_t bytes) noexcept {
#ifdef EXPERTD_X86
  if (reinterpret_cast<std::uintptr_t>(to) % sizeof(__m128i) == 0) {
    for (; bytes >= sizeof(__m128i); bytes -= sizeof(__m128i), to += sizeof(__m128i), from += sizeof(__m128i))
      _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
#endif
  std::memcpy(to, from, bytes);
}

inline void end_streams() noexcept {
#ifdef EXPERTD_X86
  _mm_sfence();
#endif
}

}  // namespace expertd
