#include "request/segment.h"

#include <string_view>

#include "request/layout.h"

namespace expertd {
namespace {

constexpr std::string_view kTensors = "call's tensors";

std::string text_of(Wide value) {
  std::string text;
  do {
    text.insert(text.begin(), static_cast<char>('0' + static_cast<int>(value % 10)));
  } while ((value /= 10) != 0);
  return text;
}

Refusal refuse(std::string text) { return {Code::kInvalidArgument, std::move(text)}; }

std::optional<Refusal> check_alignment(std::string_view field, uint64_t offset, uint64_t alignment) {
  if (offset % alignment == 0) return std::nullopt;
  return refuse(std::string(field) + " is " + std::to_string(offset) + "; it must be a multiple of " +
                std::to_string(alignment));
}

// `tensors` from `offset` on in `memory`.
std::optional<Refusal> check_end(std::string_view field, std::string_view tensors, std::string_view memory,
                                 uint64_t offset, Wide end, uint64_t size) {
  if (end <= size) return std::nullopt;
  return refuse(std::string(field) + " is " + std::to_string(offset) + " and the " + std::string(tensors) +
                " end at byte " + text_of(end) + "; the " + std::string(memory) + " has " + std::to_string(size));
}

std::optional<Refusal> check_begin(std::string_view field, uint64_t offset, uint64_t data) {
  if (offset >= data) return std::nullopt;
  return refuse(std::string(field) + " is " + std::to_string(offset) + "; the segment's data begin at byte " +
                std::to_string(data));
}

// Where sums have a place of their own.
std::optional<Refusal> check_sums(const Message& message, const Layout& at, const Shape& shape,
                                  const Segment& segment) {
  if (!message.sums_offset) return std::nullopt;
  const uint64_t offset = *message.sums_offset;
  if (message.gpu_offset) {
    return refuse("sums_offset is " + std::to_string(offset) + "; beside gpu_offset the partials are on the GPU");
  }
  if (auto refusal = check_alignment("sums_offset", offset, kAlignment)) return refusal;
  if (auto refusal = check_begin("sums_offset", offset, segment.data)) return refusal;
  return check_end("sums_offset", "partials", "segment", offset, at.sums + shape.sums_bytes(), segment.size);
}

std::string_view view(const std::byte* base, Wide at, uint64_t bytes) {
  return {reinterpret_cast<const char*>(base) + static_cast<uint64_t>(at), bytes};
}

}  // namespace

std::optional<Refusal> place(const Message& message, const Admitted& sizes, const Segment& segment, std::string* copied,
                             Placed* placed) {
  const uint64_t offset = message.segment_offset.value_or(0), gpu_offset = message.gpu_offset.value_or(0);
  if (auto refusal = check_alignment("segment_offset", offset, kAlignment)) return refusal;
  if (auto refusal = check_alignment("gpu_offset", gpu_offset, kGpuAlignment)) return refusal;
  if (!message.segment_offset)
    return refuse("segment_offset is missing; tensors of this connection lie in its segment");
  if (message.num_tensor_bytes() != 0) {
    return refuse("hidden, hidden_scales, expert_ids and weights must be empty beside segment_offset");
  }
  if (auto refusal = check_begin("segment_offset", offset, segment.data)) return refusal;
  const bool on_device = message.gpu_offset.has_value();
  const Shape shape{.tokens = sizes.tokens,
                    .width = sizes.placement->hidden_size,
                    .top_k = sizes.top_k,
                    .hidden = sizes.hidden_dtype,
                    .reply = sizes.reply_dtype};
  const Layout at = lay_out(offset, message.gpu_offset, shape, message.sums_offset);
  if (auto refusal = check_end("segment_offset", kTensors, "segment", offset, at.host_end, segment.size))
    return refusal;
  if (auto refusal = check_sums(message, at, shape, segment)) return refusal;
  if (on_device && segment.gpu == nullptr) {
    return refuse("gpu_offset is " + std::to_string(gpu_offset) + "; no GPU memory was handed over with the segment");
  }
  if (on_device && sizes.rounds()) {
    return refuse("reply_dtype is DTYPE_FLOAT8_E4M3FN; beside gpu_offset it must be DTYPE_FLOAT32 or DTYPE_BFLOAT16");
  }
  if (on_device) {
    if (auto refusal = check_end("gpu_offset", kTensors, "GPU memory", gpu_offset, at.gpu_end, segment.gpu_size))
      return refusal;
  }

  std::byte* base = on_device ? segment.gpu : segment.base;
  const uint64_t choices = shape.choice_bytes(), scales_bytes = shape.scales_bytes();
  copied->clear();
  copied->reserve(2 * choices + (on_device ? 0 : scales_bytes));
  copied->append(view(segment.base, at.ids, choices));
  copied->append(view(segment.base, at.weights, choices));
  if (!on_device) copied->append(view(segment.base, at.scales, scales_bytes));
  const std::string_view checked = *copied;
  placed->tensors = {.hidden = view(base, at.hidden, shape.hidden_bytes()),
                     .scales = on_device ? view(base, at.scales, scales_bytes) : checked.substr(2 * choices),
                     .ids = checked.substr(0, choices),
                     .weights = checked.substr(choices, choices),
                     .on_device = on_device};
  placed->sums = base + static_cast<uint64_t>(at.sums);
  return std::nullopt;
}

}  // namespace expertd
