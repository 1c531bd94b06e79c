// What an ExecuteResponse has before and after its sums.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "request/refusal.h"
#include "request/rules.h"

namespace expertd {

// Seconds that one request spent in each stage of a server.
struct StageSeconds {
  double decode = 0, queue = 0, copy_in = 0, compute = 0, copy_out = 0;
};

// The ExecuteResponse of a request is `head`, its sums and `tail`; no other order of the fields puts them in place.
// The head of a response with `sums_bytes` of sums in it; without (they are in a slot), 0.
std::string reply_head(const Admitted& request, size_t sums_bytes);

// What follows the sums, whose length does not depend on the numbers in it. `checksum` is CRC-32C over the request id,
// 8 bytes little-endian, and the sums.
std::string reply_tail(const Admitted& request, const StageSeconds& seconds, uint32_t checksum);

// That checksum; of a response whose sums are elsewhere, with none.
uint32_t reply_checksum(uint64_t request_id, const std::byte* sums, size_t sums_bytes);

// The ExecuteResponse that refuses request `request_id`.
std::string reply_refusal(uint64_t request_id, const Refusal& refusal);

// A delay as the wire has it: rounded up, so that no delay becomes none.
uint64_t whole_milliseconds(double seconds);

}  // namespace expertd
