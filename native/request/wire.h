// The protobuf wire format, as far as the two large messages need it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace expertd {

// The protobuf wire format, as far as the two large messages need it; the rules and words of proto/codec/wire.py.

inline constexpr int kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5;
// Fields of one message, known or not: what parsing costs is bounded before it begins.
inline constexpr int kMaxFields = 64;

// One field: `number` for varints, `bytes` for everything else. Refers to the message.
struct Field {
  uint64_t number = 0;
  int kind = 0;
  uint64_t value = 0;
  std::string_view bytes;
};

// Reads the fields of a message one after another, in the order of its bytes.
class FieldReader {
 public:
  explicit FieldReader(std::string_view message) : message_(message) {}

  // The next field, or nothing at the end and after an error.
  std::optional<Field> next();
  // What is wrong with the message; empty if nothing was found so far.
  const std::string& error() const { return error_; }

 private:
  bool read_varint(uint64_t* value);
  std::nullopt_t fail(std::string text);

  std::string_view message_;
  size_t position_ = 0;
  int fields_ = 0;
  std::string error_;
};

// Appends to `out`: a varint; a numeric field unless it is zero, or of four bytes whatever it is; the header of
// `length` bytes unless there are none.
void put_varint(std::string* out, uint64_t value);
void put_number(std::string* out, int field, uint64_t value);
void put_fixed32(std::string* out, int field, uint32_t value);
void put_header(std::string* out, int field, uint64_t length);
void put_bytes(std::string* out, int field, std::string_view bytes);

}  // namespace expertd
