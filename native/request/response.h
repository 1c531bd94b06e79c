// What a server answered: an ExecuteResponse as its caller reads it.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "request/message.h"
#include "request/reply.h"

namespace expertd {

struct Response {
  uint64_t request_id = 0;
  uint64_t reply_dtype = 0;
  std::string_view sums;                               // of the bytes that were read; empty where they are in a segment
  std::vector<std::pair<uint64_t, uint64_t>> receipt;  // expert and pairs, in the order of the message
  StageSeconds seconds;
  uint32_t checksum = 0;
};

// Nothing for an error, for what has more than a server of this version writes, and for what is malformed: who gets
// nothing reads the message the long way and finds out why.
std::optional<Response> read_response(std::string_view bytes);

// The number of the request that is answered; nothing for what is malformed.
std::optional<uint64_t> response_id(std::string_view bytes);

}  // namespace expertd
