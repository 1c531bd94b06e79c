// The fields of an ExecuteRequest, unchecked.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>

#include "request/refusal.h"
#include "tokens/block.h"

namespace expertd {

// The codes of proto/expert_shard.proto's DType.
enum class Dtype : uint8_t { kFloat8E4M3FN = 1, kBFloat16 = 2, kFloat32 = 3 };

// Bytes of one value.
constexpr size_t size_of(Dtype dtype) { return dtype == Dtype::kFloat8E4M3FN ? 1 : dtype == Dtype::kBFloat16 ? 2 : 4; }

// Bytes of [rows, width] values, and of their scales [rows, width / 128] FP32, which FP8 alone has.
constexpr uint64_t values_bytes(Dtype dtype, uint64_t rows, uint64_t width) { return rows * width * size_of(dtype); }
constexpr uint64_t scales_bytes(Dtype dtype, uint64_t rows, uint64_t width) {
  return dtype == Dtype::kFloat8E4M3FN ? rows * (width / QUANTIZATION_BLOCK) * sizeof(float) : 0;
}

// Bytes of sums [rows, width] in a reply: their values, and right behind them their scales.
constexpr uint64_t sums_bytes(Dtype dtype, uint64_t rows, uint64_t width) {
  return values_bytes(dtype, rows, width) + scales_bytes(dtype, rows, width);
}

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
  std::optional<uint64_t> sums_offset = std::nullopt;
  std::string_view traceparent;
  std::optional<uint32_t> fields_checksum = std::nullopt, tensors_checksum = std::nullopt;
  size_t num_bytes = 0;  // of all

  size_t num_tensor_bytes() const { return hidden.size() + hidden_scales.size() + expert_ids.size() + weights.size(); }
};

// Reads a serialized ExecuteRequest: of a field that occurs twice the last one counts, others are passed over.
std::variant<Message, Refusal> parse_message(std::string_view bytes);

// The ExecuteRequest of a message whose tensors are elsewhere.
std::string write_message(const Message& message);

// An ExecuteRequest around tensors that are still to be written into it.
class Envelope {
 public:
  // Of `message`, which has no tensors, and of so many bytes of each.
  Envelope(const Message& message, size_t hidden, size_t scales, size_t ids, size_t weights);

  struct Places {
    std::byte *hidden, *scales, *ids, *weights;
  };
  size_t size() const;
  // Writes to `out` [size] all but the tensors' bytes, which go where it says; first what `write_message` writes.
  Places write(std::byte* out) const;

 private:
  struct Piece {
    std::string before;
    size_t bytes;
  };
  std::array<Piece, 4> pieces_;  // in the order of `Places`
};

}  // namespace expertd
