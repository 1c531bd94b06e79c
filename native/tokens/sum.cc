#include "tokens/sum.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tokens/stream.h"

namespace expertd {
namespace {

// Elements that are added up at once: their sums stay in the first cache.
constexpr std::size_t TILE = 1024;

// One part's contribution to one row.
struct Source {
  const std::byte* sums;
  Format format;
  bool weighted;
  float weight;
  const std::byte* scales;
};

template <typename Number>
EXPERTD_INLINE void add(float* total, const Source& source, std::size_t at, std::size_t size) noexcept {
  const std::byte* from = source.sums + at * sizeof(typename Number::Stored);
  if (source.weighted)
    for (std::size_t i = 0; i < size; ++i)
      total[i] += Number::widen(load<typename Number::Stored>(from, i)) * source.weight;
  else
    for (std::size_t i = 0; i < size; ++i) total[i] += Number::widen(load<typename Number::Stored>(from, i));
}

// Tiles are whole blocks.
static_assert(TILE % QUANTIZATION_BLOCK == 0);
EXPERTD_INLINE void add_scaled(float* total, const Source& source, std::size_t at, std::size_t size) noexcept {
  for (std::size_t block = 0; block < size; block += QUANTIZATION_BLOCK) {
    const float scale = load<float>(source.scales, (at + block) / QUANTIZATION_BLOCK);
    const std::byte* from = source.sums + at + block;
    float values[QUANTIZATION_BLOCK];
    for (std::size_t i = 0; i < QUANTIZATION_BLOCK; ++i) values[i] = Float8::widen(load<std::uint8_t>(from, i)) * scale;
    if (source.weighted)
      for (float& value : values) value *= source.weight;
    for (std::size_t i = 0; i < QUANTIZATION_BLOCK; ++i) total[block + i] += values[i];
  }
}

template <typename Number, typename From>
EXPERTD_INLINE void convert(std::byte* to, const std::byte* from, std::size_t size) noexcept {
  // From 0, as all sums begin: it makes a positive zero of a negative one.
  for (std::size_t i = 0; i < size; ++i)
    store(to, i, Number::narrow(0.0f + From::widen(load<typename From::Stored>(from, i))));
}

// A tile of a row.
template <typename Number>
EXPERTD_INLINE void sum_tile(std::span<const Source> sources, std::size_t at, std::size_t size,
                             std::byte* to) noexcept {
  if (sources.size() == 1 && sources[0].format == Format::bfloat16 && !sources[0].weighted)
    return convert<Number, BFloat16>(to, sources[0].sums + at * sizeof(BFloat16::Stored), size);
  float total[TILE];
  std::fill_n(total, size, 0.0f);
  for (const Source& source : sources) {
    if (source.format == Format::bfloat16)
      add<BFloat16>(total, source, at, size);
    else if (source.format == Format::float16)
      add<Float16>(total, source, at, size);
    else if (source.format == Format::float8)
      add_scaled(total, source, at, size);
    else
      add<Float32>(total, source, at, size);
  }
  for (std::size_t i = 0; i < size; ++i) store(to, i, Number::narrow(total[i]));
}

// `past_caches`: what is written is more than they hold.
template <typename Number>
EXPERTD_INLINE void sum_row(std::span<const Source> sources, std::size_t width, std::byte* out,
                            bool past_caches) noexcept {
  alignas(64) std::byte tile[TILE * sizeof(typename Number::Stored)];
  for (std::size_t at = 0; at < width; at += TILE) {
    const std::size_t size = std::min(TILE, width - at);
    std::byte* const to = out + at * sizeof(typename Number::Stored);
    sum_tile<Number>(sources, at, size, past_caches ? tile : to);
    if (past_caches) stream(to, tile, size * sizeof(typename Number::Stored));
  }
}

// What is added to each row, row by row and in the order of `parts`: those of row i are [ends[i - 1], ends[i]).
struct Plan {
  std::vector<Source> sources;
  std::vector<std::size_t> ends;

  std::span<const Source> of(std::size_t row) const noexcept {
    const std::size_t begin = row ? ends[row - 1] : 0;
    return {sources.data() + begin, ends[row] - begin};
  }
};

Plan plan(std::span<const Part> parts, std::size_t rows, std::int64_t first) {
  std::vector<std::size_t> next(rows + 1);
  const auto row_of = [first](const Part& part, std::size_t i) {
    return static_cast<std::size_t>(part.rows[i] - first);
  };
  for (const Part& part : parts)
    for (std::size_t i = 0; i < part.count; ++i) {
      if (row_of(part, i) >= rows || (i && part.rows[i - 1] >= part.rows[i]))
        throw std::out_of_range("rows must ascend, each below " + std::to_string(rows));
      ++next[row_of(part, i) + 1];
    }
  std::partial_sum(next.begin(), next.end(), next.begin());
  std::vector<Source> sources(next.back());
  for (const Part& part : parts)
    for (std::size_t i = 0; i < part.count; ++i)
      sources[next[row_of(part, i)]++] = {part.sums[i], part.format, part.weights != nullptr,
                                          part.weights ? part.weights[i] : 1,
                                          part.scales.data ? part.scales[i] : nullptr};
  // Each row's next place is now where it ends.
  return {std::move(sources), std::move(next)};
}

template <typename Number>
void sum_rows(const Plan& plan, std::size_t first, std::size_t end, std::size_t width, WritableRows out,
              bool past_caches) noexcept {
  compiled([=, &plan]() EXPERTD_INLINE_LAMBDA {
    for (std::size_t row = first; row < end; ++row) sum_row<Number>(plan.of(row), width, out[row], past_caches);
  });
  if (past_caches) end_streams();
}

}  // namespace

void sum(std::span<const Part> parts, std::size_t rows, std::size_t width, Format format, WritableRows out,
         std::int64_t first_row) {
  const Plan sources = plan(parts, rows, first_row);
  const bool past_caches = rows * width * size_of(format) >= STREAMED_BYTES;
  // Several parts are added twice as fast as values are quantised, a lone one is converted eight times as fast.
  const std::size_t moved = width * size_of(format) * (1 + sources.sources.size() / std::max<std::size_t>(rows, 1));
  spread(rows, moved / (parts.size() == 1 ? 8 : 2), [&](std::size_t first, std::size_t end) noexcept {
    if (format == Format::bfloat16)
      sum_rows<BFloat16>(sources, first, end, width, out, past_caches);
    else
      sum_rows<Float32>(sources, first, end, width, out, past_caches);
  });
}

}  // namespace expertd
