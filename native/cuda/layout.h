// Where the parts of a batch lie in a bay's memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "request/message.h"

namespace expertd::cuda {

// Of all that kernels are given; the tensor memory accelerator asks for 16, allocations have as much.
inline constexpr size_t kAlignment = 256;
// The same in segments, as the contract has it.
inline constexpr size_t kSegmentAlignment = 64;

constexpr size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// What a model's batches look like on this server.
struct Shape {
  uint32_t hidden_size = 0;
  uint32_t num_experts = 0;  // local ones
  uint32_t max_top_k = 0;    // ids of a token; fewer are filled up with -1
};

// Where tokens that are computed at once, padded to their size class, lie in a bay's memory, in pinned memory as on the
// device. Rows are last, so that a copy that ends after the last one in use moves no more than it must.
struct Layout {
  Shape shape;
  uint32_t tokens = 0;  // of the size class
  Dtype hidden_dtype = Dtype::kFloat8E4M3FN, reply_dtype = Dtype::kBFloat16;

  // Inward: ids [tokens, max_top_k] int32, weights alike float32, scales float32 (FP8 alone), hidden.
  constexpr size_t ids() const { return 0; }
  constexpr size_t weights() const { return aligned(routing_bytes()); }
  constexpr size_t scales() const { return 2 * aligned(routing_bytes()); }
  constexpr size_t hidden() const { return scales() + aligned(tokens * scales_row()); }
  constexpr size_t inward_bytes() const { return aligned(hidden() + tokens * hidden_row()); }
  // Outward: pairs [num_experts] int32, sums.
  constexpr size_t pairs() const { return 0; }
  constexpr size_t sums() const { return aligned(pairs_bytes()); }
  constexpr size_t outward_bytes() const { return aligned(sums() + tokens * sums_row()); }

  constexpr size_t routing_bytes() const { return 4 * size_t{tokens} * shape.max_top_k; }
  constexpr size_t pairs_bytes() const { return 4 * size_t{shape.num_experts}; }
  constexpr size_t scales_row() const {
    return hidden_dtype == Dtype::kFloat8E4M3FN ? 4 * (shape.hidden_size / QUANTIZATION_BLOCK) : 0;
  }
  constexpr size_t hidden_row() const { return shape.hidden_size * size_of(hidden_dtype); }
  constexpr size_t sums_row() const { return shape.hidden_size * size_of(reply_dtype); }
};

// How a batch is computed: in `parts` of `tokens` tokens, but for the last one, each padded to `rows`.
struct Cut {
  uint32_t parts = 0, tokens = 0, rows = 0;
};

}  // namespace expertd::cuda
