#include "request/response.h"

#include <array>
#include <cstring>

#include "request/wire.h"

namespace expertd {
namespace {

std::optional<std::vector<uint64_t>> read_packed(std::string_view bytes) {
  std::vector<uint64_t> numbers;
  for (size_t at = 0; at < bytes.size();) {
    uint64_t number = 0;
    for (int shift = 0;; shift += 7) {
      if (at == bytes.size() || shift > 28) return std::nullopt;
      const auto byte = static_cast<uint8_t>(bytes[at++]);
      number |= uint64_t{byte & 0x7Fu} << shift;
      if (byte < 0x80) break;
    }
    numbers.push_back(number);
  }
  return numbers;
}

std::optional<StageSeconds> read_seconds(std::string_view bytes) {
  std::array<double, 5> seconds{};
  FieldReader fields(bytes);
  while (const auto field = fields.next()) {
    if (field->kind != kVarint || field->number < 1 || field->number > seconds.size()) return std::nullopt;
    seconds[field->number - 1] = static_cast<double>(field->value) / 1e9;
  }
  if (!fields.error().empty()) return std::nullopt;
  return StageSeconds{seconds[0], seconds[1], seconds[2], seconds[3], seconds[4]};
}

}  // namespace

std::optional<Response> read_response(std::string_view bytes) {
  Response response;
  std::optional<std::vector<uint64_t>> experts(std::in_place), pairs(std::in_place);
  std::optional<StageSeconds> seconds(std::in_place);
  FieldReader fields(bytes);
  while (const auto field = fields.next()) {
    const bool is_bytes = field->kind == kBytes;
    if (field->number == 1 && field->kind == kVarint) {
      response.request_id = field->value;
    } else if (field->number == 3 && field->kind == kVarint) {
      response.reply_dtype = field->value;
    } else if (field->number == 4 && is_bytes) {
      response.sums = field->bytes;
    } else if (field->number == 5 && is_bytes && experts && experts->empty()) {
      experts = read_packed(field->bytes);
    } else if (field->number == 6 && is_bytes && pairs && pairs->empty()) {
      pairs = read_packed(field->bytes);
    } else if (field->number == 7 && is_bytes) {
      seconds = read_seconds(field->bytes);
    } else if (field->number == 8 && field->kind == kFixed32) {
      std::memcpy(&response.checksum, field->bytes.data(), sizeof response.checksum);
    } else {
      return std::nullopt;
    }
  }
  if (!fields.error().empty() || !experts || !pairs || !seconds || experts->size() != pairs->size()) {
    return std::nullopt;
  }
  response.seconds = *seconds;
  for (size_t i = 0; i < experts->size(); ++i) response.receipt.emplace_back((*experts)[i], (*pairs)[i]);
  return response;
}

std::optional<uint64_t> response_id(std::string_view bytes) {
  uint64_t id = 0;
  FieldReader fields(bytes);
  while (const auto field = fields.next()) {
    if (field->number != 1) continue;
    if (field->kind != kVarint) return std::nullopt;
    id = field->value;
  }
  return fields.error().empty() ? std::optional(id) : std::nullopt;
}

}  // namespace expertd
