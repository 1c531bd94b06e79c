#include "tokens/quantize.h"

#include <algorithm>

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

template <typename Number>
void quantize_rows(Rows hidden, std::size_t first, std::size_t end, std::size_t width, WritableRows out,
                   WritableRows scales) noexcept {
  compiled([=]() EXPERTD_INLINE_LAMBDA {
    constexpr std::size_t BYTES = QUANTIZATION_BLOCK * sizeof(typename Number::Stored);
    for (std::size_t token = first; token < end; ++token)
      for (std::size_t block = 0; block < width / QUANTIZATION_BLOCK; ++block)
        store(scales[token], block,
              quantize_block<Number>(hidden[token] + block * BYTES, out[token] + block * QUANTIZATION_BLOCK));
  });
}

}  // namespace

void quantize(Rows hidden, Format format, std::size_t tokens, std::size_t width, WritableRows out,
              WritableRows scales) {
  spread(tokens, width * size_of(format), [=](std::size_t first, std::size_t end) noexcept {
    switch (format) {
      case Format::bfloat16:
        return quantize_rows<BFloat16>(hidden, first, end, width, out, scales);
      case Format::float16:
        return quantize_rows<Float16>(hidden, first, end, width, out, scales);
      case Format::float32:
        return quantize_rows<Float32>(hidden, first, end, width, out, scales);
    }
  });
}

}  // namespace expertd
