#include "lane/client_lane.h"

#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "lane/futex.h"

namespace expertd {
namespace {

int create_memory(size_t size, uint32_t entries) {
  if (!std::has_single_bit(entries) || entries < kMinEntries || entries > kMaxEntries || size <= data_at(entries)) {
    throw std::invalid_argument("a lane of " + std::to_string(entries) + " entries in " + std::to_string(size) +
                                " bytes");
  }
  const int descriptor =
      static_cast<int>(syscall(SYS_memfd_create, "expertd", MFD_CLOEXEC | MFD_ALLOW_SEALING));  // old glibcs lack it
  if (descriptor < 0) throw std::system_error(errno, std::generic_category(), "memfd_create");
  if (ftruncate(descriptor, static_cast<off_t>(size)) != 0 || fcntl(descriptor, F_ADD_SEALS, F_SEAL_SHRINK) != 0) {
    const int error = errno;
    close(descriptor);
    throw std::system_error(error, std::generic_category(), "memfd");
  }
  return descriptor;
}

}  // namespace

ClientLane::ClientLane(size_t size, uint32_t entries, SpinHost& host, int64_t spin_ns, uint32_t poster)
    : entries_(entries),
      memfd_(create_memory(size, entries)),
      memory_(std::make_shared<Mapping>(memfd_.get(), size)),
      words_(memory_->base()),
      spin_(host, spin_ns),
      free_(next_line(data_at(entries)), size) {
  words_.wide(0).store(kLaneMagic, std::memory_order_relaxed);
  words_.word(kVersion).store(kLaneVersion, std::memory_order_relaxed);
  words_.word(kEntries).store(entries, std::memory_order_relaxed);
  words_.wide(kRingAt).store(kRing, std::memory_order_relaxed);
  words_.wide(kDataAt).store(data(), std::memory_order_relaxed);
  words_.word(kPoster).store(poster, std::memory_order_relaxed);
}

ClientLane::~ClientLane() {
  if (connection_ && !forked()) close();
}

void ClientLane::connect(int socket) { connection_.emplace(socket); }

std::optional<uint64_t> ClientLane::take(uint64_t bytes) {
  if (forked()) return std::nullopt;
  const std::lock_guard lock(posting_);
  reap_abandoned();
  return free_.take(next_line(bytes));
}

void ClientLane::give_back(Room room) {
  if (forked()) return;
  const std::lock_guard lock(posting_);
  take_back({room});
}

uint64_t ClientLane::free_bytes() const {
  const std::lock_guard lock(posting_);
  return free_.free_bytes();
}

Post ClientLane::post(uint64_t slot, std::string_view request, uint32_t reply_room, bool looped) {
  if (forked()) return Post::kForked;
  const uint64_t reply = reply_at(slot, request.size()), size = memory_->size();
  if (slot % kLine || slot < data() || slot > size || request.size() > kMaxRequestBytes || reply > size ||
      reply_room > size - reply) {
    return Post::kMisplaced;
  }
  const std::lock_guard lock(posting_);
  if (!connection_ || ended()) return Post::kEnded;
  if (calls_.size() >= entries_) return Post::kFull;
  const auto [call, added] = calls_.try_emplace(slot, Call{reply, reply_room, looped, false, monotonic_ns()});
  if (!added) return Post::kMisplaced;
  std::memcpy(memory_->base() + request_at(slot), request.data(), request.size());
  prepare(words_, slot, static_cast<uint32_t>(request.size()), reply_room);
  // Before the server knows of the call: no answer comes without a bell.
  if (looped) announce_sleep(words_, kLooping);
  if (announce({slot, kRequest}, static_cast<uint32_t>(request.size()), reply_room)) return Post::kPosted;
  calls_.erase(call);
  return Post::kFull;
}

// False for a ring without room.
bool ClientLane::announce(Entry entry, uint32_t request_bytes, uint32_t reply_room) {
  if (tail_ - words_.word(kHead).load(std::memory_order_acquire) >= entries_) return false;
  entry.checksum = entry_checksum(tail_, entry, request_bytes, reply_room);
  if (push(words_, entries_, tail_++, entry)) connection_->ring();
  return true;
}

void ClientLane::nudge() const {
  if (!forked() && connection_ && !ended() && claim_bell(words_, kAsleep)) connection_->ring();
}

bool ClientLane::done(uint64_t slot) const { return words_.word(slot).load(std::memory_order_seq_cst) == kDone; }

void ClientLane::spin(uint64_t slot) {
  const int64_t now = monotonic_ns();
  const Spin::Turn turn = spin_.begin(now);
  if (turn.until == 0) return;
  int64_t later = now;
  // The clock costs as much as many looks.
  for (int looks = 1; later < turn.until && !done(slot) && !ended(); looks++) {
    pause_cpu();
    if (looks % 32 == 0) later = monotonic_ns();
  }
  spin_.end(turn, monotonic_ns());
}

Wait ClientLane::wait(uint64_t slot, int64_t deadline_ns) {
  if (forked()) return Wait::kForked;
  {
    const std::lock_guard lock(posting_);
    if (!calls_.contains(slot)) return Wait::kUnknown;
  }
  spin(slot);
  return await(words_, slot, ended_, [&](uint64_t at) {
    switch (futex_wait(memory_->base() + at, kSleeping, deadline_ns)) {
      case EINTR:
        return Wait::kInterrupted;
      case ETIMEDOUT:
        return Wait::kExpired;
      default:
        return Wait::kDone;
    }
  });
}

std::optional<std::string> ClientLane::reply(uint64_t slot) {
  if (forked()) return std::nullopt;
  const std::lock_guard lock(posting_);
  const auto found = calls_.find(slot);
  if (found == calls_.end() || !done(slot)) return std::nullopt;
  const Call call = found->second;
  calls_.erase(found);
  spin_.learn(monotonic_ns() - call.posted_ns);
  const uint32_t length = words_.word(slot + kReplyBytes).load(std::memory_order_relaxed);
  if (length > call.reply_room) return std::nullopt;
  return std::string(reinterpret_cast<const char*>(memory_->base() + call.reply), length);
}

bool ClientLane::cancel(uint64_t slot) { return cancel_call(slot, {}); }

void ClientLane::abandon(uint64_t slot, const Rooms& rooms) { cancel_call(slot, rooms); }

bool ClientLane::cancel_call(uint64_t slot, const Rooms& rooms) {
  if (forked()) return false;
  const std::lock_guard lock(posting_);
  const auto found = calls_.find(slot);
  if (found == calls_.end()) return false;
  found->second.cancelled = true;
  found->second.rooms = rooms;
  announce_sleep(words_, kLooping);
  if (!done(slot)) {
    if (!ended()) announce({slot, kCancel});
    return true;
  }
  // No bell comes any more, but to loops that one was sent to.
  if (found->second.looped && !found->second.abandoned()) return true;
  if (!ended()) take_back(rooms);
  calls_.erase(found);
  return false;
}

void ClientLane::reap_abandoned() {
  // Once the lane has ended, what is done is done, but its memory is not used again.
  if (ended()) return;
  std::erase_if(calls_, [this](const auto& entry) {
    const auto& [slot, call] = entry;
    if (!call.abandoned() || !done(slot)) return false;
    take_back(call.rooms);
    return true;
  });
}

// With the lock held.
void ClientLane::take_back(const Rooms& rooms) {
  for (const Room& room : rooms) {
    if (room.bytes != 0) free_.give_back(room.at, next_line(room.bytes));
  }
}

std::vector<uint64_t> ClientLane::reap() {
  std::vector<uint64_t> slots;
  if (forked() || ended()) return slots;
  const std::lock_guard lock(posting_);
  reap_abandoned();
  for (const auto& [slot, call] : calls_) {
    if (call.cancelled && !call.abandoned() && done(slot)) slots.push_back(slot);
  }
  for (const uint64_t slot : slots) calls_.erase(slot);
  return slots;
}

std::vector<uint64_t> ClientLane::poll() {
  std::vector<uint64_t> slots;
  if (forked()) return slots;
  if (!connection_.value().drain()) close();
  const std::lock_guard lock(posting_);
  // A bell for every answer to a thread would wake the loop for nothing.
  const auto is_waited_for = [](const auto& call) { return call.second.looped || call.second.cancelled; };
  if (std::any_of(calls_.begin(), calls_.end(), is_waited_for)) announce_sleep(words_, kLooping);
  for (const auto& [slot, call] : calls_) {
    if (call.looped && !call.cancelled && done(slot)) slots.push_back(slot);
  }
  return slots;
}

void ClientLane::close() {
  if (forked()) return;
  if (connection_) connection_->shut_down();
  const std::lock_guard lock(posting_);
  ended_.store(true, std::memory_order_seq_cst);
  for (const auto& [slot, call] : calls_) {
    release(words_, slot);
    futex_wake(memory_->base() + slot);
  }
}

size_t ClientLane::in_flight() const {
  const std::lock_guard lock(posting_);
  return calls_.size();
}

}  // namespace expertd
