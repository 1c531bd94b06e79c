#include "tokens/quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>

namespace expertd {
namespace {

constexpr float MOST = 448;
constexpr float LEAST_AMAX = 1e-10f;

// One block; its scale.
template <typename Number>
EXPERTD_INLINE float quantize_block(const std::byte* hidden, std::byte* out) noexcept {
  float values[QUANTIZATION_BLOCK];
  std::int32_t largest = 0;
  for (std::size_t i = 0; i < QUANTIZATION_BLOCK; ++i) {
    values[i] = Number::widen(load<typename Number::Stored>(hidden, i));
    // As integers magnitudes have the order of their values, with NaN above infinity: it reaches the scale.
    largest = std::max(largest, std::bit_cast<std::int32_t>(values[i]) & 0x7fffffff);
  }
  const float amax = std::bit_cast<float>(largest);
  const float scale = (amax < LEAST_AMAX ? LEAST_AMAX : amax) / MOST;
  for (std::size_t i = 0; i < QUANTIZATION_BLOCK; ++i) store(out, i, to_float8(values[i] / scale));
  return scale;
}

// Whether all scales are finite.
template <typename Number>
bool quantize_rows(Rows hidden, std::size_t first, std::size_t end, std::size_t width, WritableRows out,
                   WritableRows scales) noexcept {
  float largest = 0;
  compiled([=, &largest]() EXPERTD_INLINE_LAMBDA {
    constexpr std::size_t BYTES = QUANTIZATION_BLOCK * sizeof(typename Number::Stored);
    std::int32_t most = 0;
    for (std::size_t token = first; token < end; ++token)
      for (std::size_t block = 0; block < width / QUANTIZATION_BLOCK; ++block) {
        const float scale =
            quantize_block<Number>(hidden[token] + block * BYTES, out[token] + block * QUANTIZATION_BLOCK);
        store(scales[token], block, scale);
        most = std::max(most, std::bit_cast<std::int32_t>(scale));
      }
    largest = std::bit_cast<float>(most);
  });
  return std::isfinite(largest);
}

}  // namespace

bool quantize(Rows hidden, Format format, std::size_t tokens, std::size_t width, WritableRows out,
              WritableRows scales) {
  const auto quantized = [=](std::size_t first, std::size_t end) noexcept {
    switch (format) {
      case Format::bfloat16:
        return quantize_rows<BFloat16>(hidden, first, end, width, out, scales);
      case Format::float16:
        return quantize_rows<Float16>(hidden, first, end, width, out, scales);
      case Format::float32:
        return quantize_rows<Float32>(hidden, first, end, width, out, scales);
      case Format::float8:
        break;
    }
    return true;
  };
  std::atomic<bool> finite{true};
  spread(tokens, width * size_of(format), [&](std::size_t first, std::size_t end) noexcept {
    // Relaxed: the end of `spread` orders it.
    if (!quantized(first, end)) finite.store(false, std::memory_order_relaxed);
  });
  return finite.load(std::memory_order_relaxed);
}

}  // namespace expertd
