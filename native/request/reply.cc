#include "request/reply.h"

#include <cmath>

#include "base/crc32c.h"
#include "request/wire.h"

namespace expertd {
namespace {

void put_packed(std::string* out, int field, const std::string& content) {
  put_header(out, field, content.size());
  *out += content;
}

// A varint of always as many bytes, whose value they must hold.
void put_padded(std::string* out, uint64_t value, int bytes) {
  for (; bytes > 1; --bytes, value >>= 7) out->push_back(static_cast<char>((value & 0x7F) | 0x80));
  out->push_back(static_cast<char>(value & 0x7F));
}

// Of nanoseconds: enough for two years.
constexpr int kTimeBytes = 8;

}  // namespace

std::string reply_head(const Admitted& request, size_t sums_bytes) {
  std::string out;
  put_number(&out, 1, request.request_id);
  put_number(&out, 3, static_cast<uint64_t>(request.reply_dtype));
  put_header(&out, 4, sums_bytes);
  return out;
}

std::string reply_tail(const Admitted& request, const StageSeconds& seconds, uint32_t checksum) {
  std::string experts, pairs, timings, out;
  for (size_t local = 0; local < request.pairs.size(); ++local) {
    if (request.pairs[local] == 0) continue;
    put_varint(&experts, request.owned->experts[local]);
    put_varint(&pairs, request.pairs[local]);
  }
  int stage = 0;
  for (const double spent : {seconds.decode, seconds.queue, seconds.copy_in, seconds.compute, seconds.copy_out}) {
    put_varint(&timings, static_cast<uint64_t>(++stage) << 3 | kVarint);
    put_padded(&timings, static_cast<uint64_t>(std::llround(std::fmax(spent, 0.0) * 1e9)), kTimeBytes);
  }
  put_packed(&out, 5, experts);
  put_packed(&out, 6, pairs);
  put_varint(&out, 7 << 3 | kBytes);
  put_varint(&out, timings.size());
  out += timings;
  put_fixed32(&out, 8, checksum);
  return out;
}

uint32_t reply_checksum(uint64_t request_id, const std::byte* sums, size_t sums_bytes) {
  std::byte id[8];
  for (int i = 0; i < 8; ++i) id[i] = static_cast<std::byte>(request_id >> 8 * i & 0xFF);
  return crc32c(crc32c(0, id, sizeof id), sums, sums_bytes);
}

uint64_t whole_milliseconds(double seconds) { return static_cast<uint64_t>(std::ceil(seconds * 1e3)); }

std::string reply_refusal(uint64_t request_id, const Refusal& refusal) {
  std::string error, out;
  put_number(&error, 1, static_cast<uint64_t>(refusal.code));
  put_bytes(&error, 2, refusal.text);
  if (refusal.retry_after) put_number(&error, 3, whole_milliseconds(*refusal.retry_after));
  put_number(&out, 1, request_id);
  put_varint(&out, 2 << 3 | kBytes);
  put_varint(&out, error.size());
  out += error;
  return out;
}

}  // namespace expertd
