// Partial sums of servers, added up.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "tokens/number.h"
#include "tokens/rows.h"

namespace expertd {

// What one server gives to some rows of the result.
struct Part {
  Rows sums;  // [count, width]
  Format format;
  std::size_t count;
  const std::int64_t* rows;  // [count]: the row of the result that each belongs to, ascending
  const float* weights;      // [count]: what each is multiplied with; null: 1
  Rows scales{};             // [count, width / 128] FP32: of float8 alone
};

// out [rows, width] of `format`, which is bfloat16 or float32: to each row its parts added in FP32 to 0, in the order
// of `parts`, then rounded once. Throws std::out_of_range, before it writes, unless a part's rows ascend below `rows`.
// The first row of `out` is that of number `first` in `parts`.
void sum(std::span<const Part> parts, std::size_t rows, std::size_t width, Format format, WritableRows out,
         std::int64_t first = 0);

}  // namespace expertd
