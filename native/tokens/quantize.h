// Hidden states, or sums, to FP8 E4M3 with one FP32 scale per 1x128 block of a token.
#pragma once

#include <cstddef>

#include "tokens/number.h"
#include "tokens/rows.h"

namespace expertd {

// hidden [tokens, width] of `format`, which is not float8 -> out [tokens, width] E4M3, scales [tokens, width / 128]
// FP32; width is a multiple of 128. Bit-equal to expertd.kernels.numerics.quantize.quantize_activations. Whether all
// values were finite: others make their whole block NaN.
bool quantize(Rows hidden, Format format, std::size_t tokens, std::size_t width, WritableRows out, WritableRows scales);

}  // namespace expertd
