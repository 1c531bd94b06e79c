// The fields of an ExecuteRequest, unchecked.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <variant>

#include "request/refusal.h"

namespace expertd {

// The codes of proto/expert_shard.proto's DType.
enum class Dtype : uint8_t { kFloat8E4M3FN = 1, kBFloat16 = 2, kFloat32 = 3 };

// Bytes of one value.
constexpr size_t size_of(Dtype dtype) { return dtype == Dtype::kFloat8E4M3FN ? 1 : dtype == Dtype::kBFloat16 ? 2 : 4; }

// The fields of an ExecuteRequest, unchecked. Views refer to the received bytes.
struct Message {
  uint64_t request_id = 0;
  std::string_view model_fingerprint;
  std::optional<uint64_t> placement_epoch;
  uint64_t layer = 0;
  uint64_t num_tokens = 0;
  uint64_t top_k = 0;
  uint64_t hidden_dtype = 0;
  uint64_t reply_dtype = 0;
  std::string_view hidden, hidden_scales, expert_ids, weights;
  uint64_t timeout_us = 0;
  std::optional<uint64_t> segment_offset, cancels, gpu_offset;
  std::string_view traceparent;

  size_t num_tensor_bytes() const { return hidden.size() + hidden_scales.size() + expert_ids.size() + weights.size(); }
};

// Reads a serialized ExecuteRequest: of a field that occurs twice the last one counts, others are passed over.
std::variant<Message, Refusal> parse_message(std::string_view bytes);

}  // namespace expertd
