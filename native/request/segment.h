// Where a request's tensors lie in memory that its caller shares.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "request/message.h"
#include "request/refusal.h"
#include "request/rules.h"

namespace expertd {

// What a caller shares: memory of the host, from `data` on its tensors', and perhaps memory of the GPU. The caller may
// write to it at any time.
struct Segment {
  std::byte* base = nullptr;
  uint64_t size = 0;
  uint64_t data = 0;
  std::byte* gpu = nullptr;  // on the device
  uint64_t gpu_size = 0;
};

// The tensors of a request in a segment. What is checked is copied first: ids, weights, and scales that are not on a
// GPU. Everything else is read in place: every byte of it is a value, and a token's values reach no other token's sums.
struct Placed {
  Tensors tensors;
  std::byte* sums = nullptr;  // on the device if the hidden states are
};

// `copied` gets what is copied, and must live as long as the tensors. Tensors are one after another, each at a multiple
// of 64 in the segment, of 256 on the GPU: hidden, scales, ids, weights and sums, or with a `gpu_offset` ids and
// weights in the segment and the others on the GPU. With a `sums_offset` the sums are there, in the segment.
std::optional<Refusal> place(const Message& message, const Admitted& sizes, const Segment& segment, std::string* copied,
                             Placed* placed);

}  // namespace expertd
