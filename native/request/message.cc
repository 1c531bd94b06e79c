#include "request/message.h"

#include <string>

#include "request/wire.h"

namespace expertd {
namespace {

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
    default:
      break;
  }
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
  FieldReader reader(bytes);
  while (const auto field = reader.next()) {
    if (field->kind == kVarint) store_number(&message, field->number, field->value);
    if (field->kind == kBytes) store_bytes(&message, field->number, field->bytes);
  }
  if (reader.error().empty()) return message;
  return Refusal{Code::kInvalidArgument, "the " + std::to_string(bytes.size()) +
                                             " bytes received are no expertd.v1.ExecuteRequest: " + reader.error()};
}

}  // namespace expertd
