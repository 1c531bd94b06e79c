// Where the tensors of a call lie in shared memory: one rule for both ends.
#pragma once

#include <cstdint>
#include <optional>

#include "request/message.h"

namespace expertd {

using Wide = unsigned __int128;  // offsets are the caller's words: 64 bits, to which lengths are added

inline constexpr uint64_t kAlignment = 64, kGpuAlignment = 256;

// What decides how long each tensor is.
struct Shape {
  uint64_t tokens = 0, width = 0, top_k = 0;
  Dtype hidden = Dtype::kFloat8E4M3FN, reply = Dtype::kBFloat16;

  uint64_t hidden_bytes() const { return values_bytes(hidden, tokens, width); }
  uint64_t scales_bytes() const { return expertd::scales_bytes(hidden, tokens, width); }
  uint64_t choice_bytes() const { return tokens * top_k * 4; }
  uint64_t sums_bytes() const { return expertd::sums_bytes(reply, tokens, width); }
};

// Where each tensor begins, and where the last ones end in either memory.
struct Layout {
  Wide hidden = 0, scales = 0, ids = 0, weights = 0, sums = 0, host_end = 0, gpu_end = 0;
};

// Tensors are one after another, each at a multiple of 64 in the segment, of 256 on the GPU: hidden, scales, ids,
// weights and sums, or with a `gpu_offset` ids and weights in the segment and the others on the GPU. With a
// `sums_offset` the sums are there instead, and `host_end` is that of the others.
inline Layout lay_out(uint64_t offset, std::optional<uint64_t> gpu_offset, const Shape& shape,
                      std::optional<uint64_t> sums_offset = std::nullopt) {
  struct Places {
    Wide next, end;
    uint64_t alignment;
    Wide add(uint64_t bytes) {
      const Wide at = next;
      end = at + bytes;
      next = (end + alignment - 1) / alignment * alignment;
      return at;
    }
  };
  Places host{offset, 0, kAlignment}, gpu{gpu_offset.value_or(0), 0, kGpuAlignment};
  Places& rows = gpu_offset ? gpu : host;
  Layout at;
  at.hidden = rows.add(shape.hidden_bytes());
  at.scales = rows.add(shape.scales_bytes());
  at.ids = host.add(shape.choice_bytes());
  at.weights = host.add(shape.choice_bytes());
  at.sums = sums_offset ? Wide{*sums_offset} : rows.add(shape.sums_bytes());
  at.host_end = host.end;
  at.gpu_end = gpu.end;
  return at;
}

}  // namespace expertd
