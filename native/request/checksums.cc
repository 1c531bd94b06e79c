#include "request/checksums.h"

#include <array>
#include <bit>
#include <cstdio>
#include <string_view>

#include "base/crc32c.h"

namespace expertd {
namespace {

constexpr uint64_t kAbsent = UINT64_MAX;

static_assert(std::endian::native == std::endian::little, "the words of a checksum are little-endian");

uint32_t after(uint32_t checksum, std::string_view bytes) {
  return crc32c(checksum, reinterpret_cast<const std::byte*>(bytes.data()), bytes.size());
}

// A fault, and not the caller's: who gets it asks again.
std::optional<Refusal> compare(const char* field, const char* what, uint32_t sent, uint32_t found) {
  if (sent == found) return std::nullopt;
  char text[128];
  std::snprintf(text, sizeof text, "%s is 0x%08x; the %s that came have 0x%08x: the request was altered on its way",
                field, sent, what, found);
  return Refusal{Code::kInternal, text};
}

}  // namespace

uint32_t fields_checksum(const Message& message) {
  const std::array<uint64_t, 10> words{message.request_id,
                                       message.placement_epoch.value_or(kAbsent),
                                       message.layer,
                                       message.num_tokens,
                                       message.top_k,
                                       message.hidden_dtype,
                                       message.reply_dtype,
                                       message.segment_offset.value_or(kAbsent),
                                       message.gpu_offset.value_or(kAbsent),
                                       message.tensors_checksum ? *message.tensors_checksum : kAbsent};
  uint32_t checksum = crc32c(0, reinterpret_cast<const std::byte*>(words.data()), sizeof words);
  // Younger than the others: requests without it have the checksum that they had before.
  if (message.sums_offset) {
    checksum = crc32c(checksum, reinterpret_cast<const std::byte*>(&*message.sums_offset), sizeof(uint64_t));
  }
  return after(checksum, message.model_fingerprint);
}

uint32_t tensors_checksum(const Tensors& tensors) {
  uint32_t checksum = 0;
  if (!tensors.on_device) checksum = after(after(0, tensors.hidden), tensors.scales);
  return after(after(checksum, tensors.ids), tensors.weights);
}

std::optional<Refusal> check_fields(const Message& message) {
  if (!message.fields_checksum) return std::nullopt;
  return compare("fields_checksum", "fields", *message.fields_checksum, fields_checksum(message));
}

std::optional<Refusal> check_bytes(const Message& message, const Tensors& tensors) {
  if (!message.tensors_checksum) return std::nullopt;
  return compare("tensors_checksum", "tensors", *message.tensors_checksum, tensors_checksum(tensors));
}

}  // namespace expertd
