// Where the parts of a batch lie in a bay's memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace expertd::cuda {

inline constexpr uint8_t kFp8 = 1, kBf16 = 2, kFp32 = 3;  // as in proto/expert_shard.proto
inline constexpr size_t kScaleBlock = 128;                // hidden values that share a scale

constexpr size_t dtype_bytes(uint8_t dtype) { return dtype == kFp8 ? 1 : dtype == kBf16 ? 2 : 4; }

// What a model's batches look like on this server.
struct Shape {
  uint32_t hidden_size = 0;
  uint32_t num_experts = 0;  // local ones
  uint32_t max_top_k = 0;    // ids of a token; fewer are filled up with -1
};

// Where the parts of a batch, padded to its size class, lie in a bay's memory, in pinned memory as on the device. Rows
// are last, so that a copy that ends after the last one in use moves no more than it must.
struct Layout {
  Shape shape;
  uint32_t tokens = 0;  // of the size class
  uint8_t hidden_dtype = kFp8, reply_dtype = kBf16;

  // Inward: ids [tokens, max_top_k] int32, weights alike float32, scales float32 (FP8 alone), hidden.
  constexpr size_t ids() const { return 0; }
  constexpr size_t weights() const { return aligned(routing_bytes()); }
  constexpr size_t scales() const { return 2 * aligned(routing_bytes()); }
  constexpr size_t hidden() const { return scales() + aligned(tokens * scales_row()); }
  constexpr size_t inward_bytes() const { return hidden() + tokens * hidden_row(); }
  // Outward: pairs [num_experts] int32, sums.
  constexpr size_t pairs() const { return 0; }
  constexpr size_t sums() const { return aligned(4 * size_t{shape.num_experts}); }
  constexpr size_t outward_bytes() const { return sums() + tokens * sums_row(); }

  constexpr size_t routing_bytes() const { return 4 * size_t{tokens} * shape.max_top_k; }
  constexpr size_t scales_row() const { return hidden_dtype == kFp8 ? 4 * (shape.hidden_size / kScaleBlock) : 0; }
  constexpr size_t hidden_row() const { return shape.hidden_size * dtype_bytes(hidden_dtype); }
  constexpr size_t sums_row() const { return shape.hidden_size * dtype_bytes(reply_dtype); }

 private:
  // The tensor memory accelerator asks for 16 of addresses; allocations have 256 or more.
  static constexpr size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }
};

}  // namespace expertd::cuda
