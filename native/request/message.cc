#include "request/message.h"

#include <cstring>
#include <string>

#include "request/wire.h"

namespace expertd {
namespace {

// How messages begin whose first field is fields_checksum.
constexpr std::string_view kChecked = "\x95\x01";

void store_number(Message* message, uint64_t number, uint64_t value) {
  switch (number) {
    case 1:
      message->request_id = value;
      break;
    case 3:
      message->placement_epoch = value;
      break;
    case 4:
      message->layer = value;
      break;
    case 5:
      message->num_tokens = value;
      break;
    case 6:
      message->top_k = value;
      break;
    case 7:
      message->hidden_dtype = value;
      break;
    case 8:
      message->reply_dtype = value;
      break;
    case 13:
      message->timeout_us = value;
      break;
    case 14:
      message->segment_offset = value;
      break;
    case 16:
      message->cancels = value;
      break;
    case 17:
      message->gpu_offset = value;
      break;
    case 20:
      message->sums_offset = value;
      break;
    default:
      break;
  }
}

void store_fixed(Message* message, uint64_t number, std::string_view bytes) {
  uint32_t value;
  std::memcpy(&value, bytes.data(), sizeof value);
  if (number == 18) message->fields_checksum = value;
  if (number == 19) message->tensors_checksum = value;
}

void store_bytes(Message* message, uint64_t number, std::string_view bytes) {
  switch (number) {
    case 2:
      message->model_fingerprint = bytes;
      break;
    case 9:
      message->hidden = bytes;
      break;
    case 10:
      message->hidden_scales = bytes;
      break;
    case 11:
      message->expert_ids = bytes;
      break;
    case 12:
      message->weights = bytes;
      break;
    case 15:
      message->traceparent = bytes;
      break;
    default:
      break;
  }
}

}  // namespace

std::variant<Message, Refusal> parse_message(std::string_view bytes) {
  Message message;
  message.num_bytes = bytes.size();
  FieldReader reader(bytes);
  while (const auto field = reader.next()) {
    if (field->kind == kVarint) store_number(&message, field->number, field->value);
    if (field->kind == kBytes) store_bytes(&message, field->number, field->bytes);
    if (field->kind == kFixed32) store_fixed(&message, field->number, field->bytes);
  }
  if (reader.error().empty()) return message;
  const std::string text =
      "the " + std::to_string(bytes.size()) + " bytes received are no expertd.v1.ExecuteRequest: " + reader.error();
  if (!bytes.starts_with(kChecked)) return Refusal{Code::kInvalidArgument, text};
  return Refusal{Code::kInternal, text + "; they begin with a checksum: the request was altered on its way"};
}

std::string write_message(const Message& message) {
  std::string out;
  const auto put_present = [&out](int field, const std::optional<uint64_t>& value) {
    if (!value) return;
    put_varint(&out, static_cast<uint64_t>(field) << 3 | kVarint);
    put_varint(&out, *value);
  };
  // First, so that no length that is altered hides it.
  if (message.fields_checksum) put_fixed32(&out, 18, *message.fields_checksum);
  put_number(&out, 1, message.request_id);
  put_bytes(&out, 2, message.model_fingerprint);
  put_present(3, message.placement_epoch);
  put_number(&out, 4, message.layer);
  put_number(&out, 5, message.num_tokens);
  put_number(&out, 6, message.top_k);
  put_number(&out, 7, message.hidden_dtype);
  put_number(&out, 8, message.reply_dtype);
  put_number(&out, 13, message.timeout_us);
  put_present(14, message.segment_offset);
  put_bytes(&out, 15, message.traceparent);
  put_present(20, message.sums_offset);
  if (message.tensors_checksum) put_fixed32(&out, 19, *message.tensors_checksum);
  return out;
}

Envelope::Envelope(const Message& message, size_t hidden, size_t scales, size_t ids, size_t weights)
    : pieces_{{{write_message(message), hidden}, {"", scales}, {"", ids}, {"", weights}}} {
  int field = 9;
  for (Piece& piece : pieces_) put_header(&piece.before, field++, piece.bytes);
}

size_t Envelope::size() const {
  size_t size = 0;
  for (const Piece& piece : pieces_) size += piece.before.size() + piece.bytes;
  return size;
}

Envelope::Places Envelope::write(std::byte* out) const {
  std::array<std::byte*, 4> places{};
  for (size_t i = 0; i < pieces_.size(); ++i) {
    std::memcpy(out, pieces_[i].before.data(), pieces_[i].before.size());
    places[i] = out + pieces_[i].before.size();
    out = places[i] + pieces_[i].bytes;
  }
  return {places[0], places[1], places[2], places[3]};
}

}  // namespace expertd
