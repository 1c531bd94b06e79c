#include "lane/server_lane.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "lane/futex.h"

namespace expertd {

ServerLane::ServerLane(std::shared_ptr<Mapping> memory, int socket, uint32_t min_room, uint32_t entries, uint64_t data)
    : memory_(std::move(memory)),
      connection_(socket),
      words_(memory_->base()),
      min_room_(min_room),
      entries_(entries),
      data_(data),
      posted_by_gpu_(words_.word(kPoster).load(std::memory_order_relaxed) == kGpu) {}

std::unique_ptr<ServerLane> ServerLane::attach(std::shared_ptr<Mapping> memory, int socket, uint32_t min_room,
                                               std::string* reason) {
  const uint64_t size = memory->size();
  if (size < kRing) {
    *reason = "the segment has " + std::to_string(size) + " bytes; its ring begins at " + std::to_string(kRing);
    return nullptr;
  }
  const Words words(memory->base());
  const uint64_t magic = words.wide(0).load(std::memory_order_relaxed);
  const uint32_t version = words.word(kVersion).load(std::memory_order_relaxed);
  const uint32_t entries = words.word(kEntries).load(std::memory_order_relaxed);
  const uint64_t ring = words.wide(kRingAt).load(std::memory_order_relaxed);
  const uint64_t data = words.wide(kDataAt).load(std::memory_order_relaxed);
  if (magic != kLaneMagic || version != kLaneVersion) {
    *reason = "the segment begins with no lane of version " + std::to_string(kLaneVersion);
  } else if (!std::has_single_bit(entries) || entries < kMinEntries || entries > kMaxEntries) {
    *reason = "the ring has " + std::to_string(entries) + " entries; it must be a power of two from " +
              std::to_string(kMinEntries) + " to " + std::to_string(kMaxEntries);
  } else if (ring != kRing || data % kLine || data < data_at(entries) || data >= size) {
    *reason = "the ring is at " + std::to_string(ring) + " and the data at " + std::to_string(data) + " of " +
              std::to_string(size) + " bytes; they must be at " + std::to_string(kRing) + " and, a multiple of " +
              std::to_string(kLine) + ", from " + std::to_string(data_at(entries)) + " on";
  } else {
    return std::unique_ptr<ServerLane>(new ServerLane(std::move(memory), socket, min_room, entries, data));
  }
  return nullptr;
}

size_t ServerLane::take(std::span<Posted> out) {
  if (ended_) return 0;
  const uint32_t posted = words_.word(kTail).load(std::memory_order_acquire) - head_;
  if (memory_->broken()) {
    fail("the segment has lost memory");
  } else if (posted > entries_) {
    fail("the ring's tail is " + std::to_string(posted) + " entries ahead of its head");
  }
  size_t taken = 0;
  for (uint32_t i = 0; !ended_ && i < posted && taken < out.size() && in_flight_ < entries_; i++) {
    if (!check(peek(words_, entries_, head_), &out[taken])) break;
    if (out[taken].kind == kRequest) in_flight_++;
    head_++;
    taken++;
  }
  // Releases the entries: they may be written again once this is seen.
  if (taken) words_.word(kHead).store(head_, std::memory_order_release);
  return taken;
}

bool ServerLane::check(const Entry& entry, Posted* posted) {
  const uint64_t size = memory_->size();
  *posted = {.slot = entry.slot, .kind = entry.kind};
  if (entry.kind != kRequest && entry.kind != kCancel) {
    return fail("an entry has the kind " + std::to_string(entry.kind));
  }
  // Subtracted, not added, so that nothing can overflow.
  if (entry.slot % kLine || entry.slot < data_ || entry.slot >= size || size - entry.slot < kLine) {
    return fail("an entry's slot is " + std::to_string(entry.slot) + "; it must be a multiple of " +
                std::to_string(kLine) + " from " + std::to_string(data_) + " on and below " + std::to_string(size));
  }
  if (entry.kind == kCancel) return check_sum(entry, 0, 0);
  posted->request_bytes = words_.word(entry.slot + kRequestBytes).load(std::memory_order_relaxed);
  posted->reply_room = words_.word(entry.slot + kReplyRoom).load(std::memory_order_relaxed);
  posted->reply = reply_at(entry.slot, posted->request_bytes);
  if (posted->request_bytes > kMaxRequestBytes) {
    return fail("a request has " + std::to_string(posted->request_bytes) + " bytes; at most " +
                std::to_string(kMaxRequestBytes) + " are read");
  }
  if (posted->reply_room < min_room_ || posted->reply > size || posted->reply_room > size - posted->reply) {
    return fail("a slot has room for replies of " + std::to_string(posted->reply_room) + " bytes at " +
                std::to_string(posted->reply) + " of " + std::to_string(size) + "; " + std::to_string(min_room_) +
                " are needed");
  }
  return check_sum(entry, posted->request_bytes, posted->reply_room);
}

bool ServerLane::check_sum(const Entry& entry, uint32_t request_bytes, uint32_t reply_room) {
  if (entry.checksum == 0) return true;
  const uint32_t found = entry_checksum(head_, entry, request_bytes, reply_room);
  if (found == entry.checksum) return true;
  char text[128];
  std::snprintf(text, sizeof text, "entry %u has the checksum 0x%08x; what it says has 0x%08x: it was altered", head_,
                entry.checksum, found);
  return fail(text);
}

std::string_view ServerLane::message(const Posted& posted, std::span<char> out) const {
  const size_t length = std::min<size_t>(posted.request_bytes, out.size());
  std::memcpy(out.data(), memory_->base() + request_at(posted.slot), length);
  return {out.data(), length};
}

void ServerLane::answer(const Posted& posted, std::string_view reply, uint32_t code, uint32_t receipt) {
  // A longer one would be a fault of ours; cut, it cannot be read, and is an error to the caller.
  const auto length = static_cast<uint32_t>(std::min<size_t>(reply.size(), posted.reply_room));
  std::memcpy(memory_->base() + posted.reply, reply.data(), length);
  in_flight_--;
  if (finish(words_, posted.slot, {length, code, receipt})) futex_wake(memory_->base() + posted.slot, 1);
  if (posted_by_gpu_) words_.word(kAnswered).store(1, std::memory_order_seq_cst);
  if (claim_bell(words_, kLooping)) connection_.ring();
}

bool ServerLane::arm() {
  if (ended_) return true;
  announce_sleep(words_, kAsleep);
  // What cannot be taken before an answer is no reason to stay awake: answers come from us.
  return words_.word(kTail).load(std::memory_order_seq_cst) == head_ || in_flight_ == entries_;
}

void ServerLane::disarm() { words_.word(kAsleep).store(0, std::memory_order_relaxed); }

void ServerLane::end(std::string_view message) {
  ended_ = true;
  connection_.send_reason(message);
}

bool ServerLane::fail(std::string reason) {
  ended_ = true;
  reason_ = std::move(reason);
  return false;
}

}  // namespace expertd
