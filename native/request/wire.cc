#include "request/wire.h"

namespace expertd {

std::optional<Field> FieldReader::next() {
  if (position_ >= message_.size() || !error_.empty()) return std::nullopt;
  if (++fields_ > kMaxFields) return fail("more than " + std::to_string(kMaxFields) + " fields");
  uint64_t tag = 0;
  if (!read_varint(&tag)) return std::nullopt;
  Field field{.number = tag >> 3, .kind = static_cast<int>(tag & 7), .value = 0, .bytes = {}};
  if (field.number == 0 || field.number >= 1u << 29) {
    return fail("field number " + std::to_string(field.number) + " at byte " + std::to_string(position_));
  }
  uint64_t length = 0;
  switch (field.kind) {
    case kVarint:
      if (!read_varint(&field.value)) return std::nullopt;
      return field;
    case kBytes:
      if (!read_varint(&length)) return std::nullopt;
      break;
    case kFixed32:
      length = 4;
      break;
    case kFixed64:
      length = 8;
      break;
    default:
      return fail("wire type " + std::to_string(field.kind) + " at byte " + std::to_string(position_));
  }
  const size_t left = message_.size() - position_;
  if (length > left) {
    return fail("field " + std::to_string(field.number) + " has " + std::to_string(length) + " bytes; " +
                std::to_string(left) + " are left");
  }
  field.bytes = message_.substr(position_, length);
  position_ += length;
  return field;
}

bool FieldReader::read_varint(uint64_t* value) {
  unsigned __int128 wide = 0;
  for (int shift = 0; shift < 70 && position_ < message_.size(); shift += 7) {
    const auto byte = static_cast<uint8_t>(message_[position_++]);
    wide |= static_cast<unsigned __int128>(byte & 0x7F) << shift;
    if (byte < 0x80) {
      if (wide >> 64) {
        fail("a number exceeds 64 bits");
        return false;
      }
      *value = static_cast<uint64_t>(wide);
      return true;
    }
  }
  fail("a number is cut off or takes more than 10 bytes");
  return false;
}

std::nullopt_t FieldReader::fail(std::string text) {
  error_ = std::move(text);
  return std::nullopt;
}

void put_varint(std::string* out, uint64_t value) {
  for (; value > 0x7F; value >>= 7) out->push_back(static_cast<char>((value & 0x7F) | 0x80));
  out->push_back(static_cast<char>(value));
}

void put_number(std::string* out, int field, uint64_t value) {
  if (value == 0) return;
  put_varint(out, static_cast<uint64_t>(field) << 3 | kVarint);
  put_varint(out, value);
}

void put_fixed32(std::string* out, int field, uint32_t value) {
  put_varint(out, static_cast<uint64_t>(field) << 3 | kFixed32);
  for (int shift = 0; shift < 32; shift += 8) out->push_back(static_cast<char>(value >> shift & 0xFF));
}

void put_header(std::string* out, int field, uint64_t length) {
  if (length == 0) return;
  put_varint(out, static_cast<uint64_t>(field) << 3 | kBytes);
  put_varint(out, length);
}

void put_bytes(std::string* out, int field, std::string_view bytes) {
  put_header(out, field, bytes.size());
  out->append(bytes);
}

}  // namespace expertd
