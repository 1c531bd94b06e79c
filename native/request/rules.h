// Whether a request may be computed, in the words of the Python rules.
#pragma once

#include <cstdint>
#include <string_view>
#include <variant>
#include <vector>

#include "request/message.h"
#include "request/placement.h"
#include "request/refusal.h"

namespace expertd {

// The bytes of a request's tensors, wherever they lie: in its message or in a slot. No alignment is asked for.
struct Tensors {
  std::string_view hidden, scales, ids, weights;
  bool on_device = false;  // hidden states and scales: their addresses are the device's
};

// A request that may be computed. Views refer to the tensors that were checked.
struct Admitted {
  PlacementPtr placement;
  const OwnedLayer* owned = nullptr;  // the placement's, of `layer`
  uint64_t request_id = 0;
  uint32_t layer = 0;
  uint32_t tokens = 0;
  uint32_t top_k = 0;
  Dtype hidden_dtype = Dtype::kFloat8E4M3FN;
  Dtype reply_dtype = Dtype::kBFloat16;
  std::string_view hidden;         // [tokens, hidden_size] of hidden_dtype
  std::string_view scales;         // [tokens, hidden_size / 128] float32, or empty for BF16
  std::string_view weights;        // [tokens, top_k] float32, finite
  std::vector<int32_t> local_ids;  // [tokens, top_k]: local expert or -1; at most once in a row
  std::vector<uint32_t> pairs;     // by local expert: the receipt
  uint64_t timeout_us = 0;         // 0: none
  bool checked = false;            // its tensors had a checksum: so have its sums, wherever they are

  size_t reply_bytes() const { return sums_bytes(reply_dtype, tokens, placement->hidden_size); }
  // Of the sums that are computed, which those of an FP8 reply are made of.
  Dtype sums_dtype() const { return rounds() ? Dtype::kFloat32 : reply_dtype; }
  size_t computed_bytes() const { return computed_bytes(sums_dtype()); }
  size_t computed_bytes(Dtype dtype) const { return values_bytes(dtype, tokens, placement->hidden_size); }
  bool rounds() const { return reply_dtype == Dtype::kFloat8E4M3FN; }
};

// Checksum of its fields, sizes and dtypes of a message: what has to be right before the place of its tensors is known.
std::variant<Admitted, Refusal> check_sizes(const Message& message, PlacementPtr placement);

// Everything else: checksum of the tensors, lengths, fingerprint, epoch, layer, weights, scales and ids. Nothing, or
// why `request` is refused.
std::optional<Refusal> check_tensors(const Message& message, const Tensors& tensors, Admitted* request);

// At most 64 bytes in quotes, others than printable ASCII as \xhh, with the length of what is longer.
std::string quoted(std::string_view text);

}  // namespace expertd
