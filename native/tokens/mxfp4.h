// Weights in MXFP4, E2M1 values with a power of two for each 32 of a row, to FP8 E4M3 in blocks of 128x128.
#pragma once

#include <cstddef>

#include "tokens/rows.h"

namespace expertd {

struct Converted {
  std::size_t inexact;  // weights that are not what was stored
  bool any;             // whether a weight is not zero
};

// packed [rows, columns / 2], the value of the lower column in the lower half of a byte, with exponents
// [rows, columns / 32] of bias 127, none of which is 255 -> out [rows, columns] E4M3, scales [rows / 128, columns /
// 128] FP32. Rows and columns are multiples of 128. Bit-equal to round_to_blocks(decode(packed,
// exponents)) of expertd.kernels.numerics.mxfp4: a block's scale is the power of two with which its largest magnitude
// becomes 256 or 384, but at least 2^-126, or 1 where all is zero.
Converted convert_mxfp4(Rows packed, Rows exponents, std::size_t rows, std::size_t columns, WritableRows out,
                        WritableRows scales) noexcept;

}  // namespace expertd
