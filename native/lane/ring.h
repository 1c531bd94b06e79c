// The lane's memory, word by word, and what each end does with it.
#pragma once

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "base/crc32c.h"

namespace expertd {

// THE LANE, version 3: calls between two processes of one machine, without a copy of tensors and mostly without a
// system call. A caller owns a memfd (sealed against shrinking) that both ends map, and a stream socket. All numbers
// are little-endian; each is read and written as one aligned word. Its bytes:
//
//   at           written by          what
//   0            caller, once        u64 magic "expertdL", u32 version 3, u32 entries (2^6 to 2^12, a power of two),
//                                    u64 ring 4096, u64 data (a multiple of 64, at least 4096 + 16 an entry), u32
//                                    poster: 0 a host, which rings, 1 a GPU, which cannot; then zeros
//   64           caller              u32 tail: entries ever posted, modulo 2^32
//   128          server              u32 head: entries ever taken, likewise; only the caller reads it
//   192          both                u32 asleep: 1 while the server sleeps or is about to
//   256          both                u32 looping: 1 while an event loop of the caller waits for answers
//   320          both                u32 answered: 0 once a GPU has posted, 1 once its call is done
//   384 to 4096  caller              whatever it likes
//   4096 + 16 i  caller              entry i (modulo entries): u64 slot, u32 kind (1 request, 2 cancel), u32 checksum
//   slot         both                u32 state (1 posted, 3 posted and a thread sleeps on it, 4 done),
//                caller              u32 request bytes (at most 4096), u32 reply room (at least 1024 + 8 for each of
//                                    the model's experts),
//                server              u32 reply bytes, u32 code (0 or the error's), u32 receipt (see below); the rest
//                                    of the 64 bytes is unused
//   slot + 64    caller              an ExecuteRequest without tensors
//   reply        server              an ExecuteResponse without tensors; reply is slot + 64 + request bytes, up to a
//                                    multiple of 64
//
// A slot is a multiple of 64 in [data, size), as is what segment_offset names; the caller says where slots are, and no
// slot is in two calls at once. Tensors may lie before their slot, so that a request's length does not depend on where
// they are.
//
// POST: write slot and entry, then tail + 1 (sequentially consistent, as all that follows), then load asleep: if it is
// 1, swap it for 0; who got the 1 sends a bell, a byte 0 on the socket. tail - head never exceeds entries, nor do the
// requests in flight. SLEEP, the server: store 1 in asleep, load every tail once more, sleep on sockets. ANSWER: write
// reply and reply bytes, exchange state for 4; if it was 3, FUTEX_WAKE (shared) on state; then load looping and do as
// with asleep. A THREAD waits by changing state from 1 to 3 and FUTEX_WAIT on 3. AN EVENT LOOP waits by storing 1 in
// looping, then loading the states of its calls, then sleeping on the socket. Why no wake-up is lost: each pair of
// sides writes its own word and then reads the other's, and the four accesses have one total order, so that not both
// can read the old values; a bell that comes before the sleep waits in the socket. Of a state there is one order of
// changes: either the change from 1 to 3 fails, or the exchange finds 3; the kernel compares once more.
//
// A GPU posts and waits as the caller's host does, but for bells: it looks at the state all the time, and of a lane
// whose poster is a GPU the server looks at tail at least once a millisecond, also while it sleeps. One call is in
// flight at a time; with it done the server changes answered, too, which a GPU's stream can wait for. The caller's host
// may ring beforehand. Slots may be posted again as they are. Code and receipt are there for who cannot read replies:
// the receipt is the sum, modulo 2^32, of `receipt_term` over all pairs computed.
//
// THE END: the server may send a byte 1 and an ExecuteResponse after its length (u32), the reason; then, or when either
// process is gone, the socket is closed. After that calls that are done count, all others are lost, and the memory is
// never used again, since the other process or its GPU may still write to it. A server reads each word once, into a
// local, and checks it there.

inline constexpr uint64_t kLaneMagic = 0x4c64747265707865;
inline constexpr uint32_t kLaneVersion = 3;
inline constexpr uint32_t kMinEntries = 1 << 6, kMaxEntries = 1 << 12;
inline constexpr uint64_t kLine = 64;
inline constexpr uint64_t kVersion = 8, kEntries = 12, kRingAt = 16, kDataAt = 24, kPoster = 32;  // geometry
inline constexpr uint64_t kTail = 64, kHead = 128, kAsleep = 192, kLooping = 256, kAnswered = 320, kRing = 4096,
                          kEntryBytes = 16;
inline constexpr uint64_t kRequestBytes = 4, kReplyRoom = 8, kReplyBytes = 12, kCode = 16, kReceipt = 20;  // of a slot
inline constexpr uint32_t kMaxRequestBytes = 4096;
inline constexpr uint32_t kHost = 0, kGpu = 1;                    // posters
inline constexpr uint32_t kRequest = 1, kCancel = 2;              // kinds
inline constexpr uint32_t kPosted = 1, kSleeping = 3, kDone = 4;  // states
inline constexpr char kBell = 0, kReason = 1;                     // on the socket

static_assert(std::endian::native == std::endian::little, "the lane's words are little-endian");

constexpr uint64_t next_line(uint64_t at) { return (at + kLine - 1) / kLine * kLine; }
constexpr uint64_t request_at(uint64_t slot) { return slot + kLine; }
constexpr uint64_t reply_at(uint64_t slot, uint64_t request_bytes) {
  return next_line(request_at(slot) + request_bytes);
}
constexpr uint64_t data_at(uint32_t entries) { return kRing + entries * kEntryBytes; }

// The words of a mapping. What follows is a template over it, so that an explorer can stand in for the memory.
class Words {
 public:
  explicit Words(std::byte* base) : base_(base) {}

  // Safe for `at` that are aligned and inside of the mapping, whatever the other process does to them.
  std::atomic_ref<uint32_t> word(uint64_t at) const {
    return std::atomic_ref<uint32_t>(*reinterpret_cast<uint32_t*>(base_ + at));
  }
  std::atomic_ref<uint64_t> wide(uint64_t at) const {
    return std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(base_ + at));
  }

 private:
  std::byte* base_;
};

static_assert(std::atomic_ref<uint32_t>::is_always_lock_free && std::atomic_ref<uint64_t>::is_always_lock_free);

struct Entry {
  uint64_t slot = 0;
  uint32_t kind = 0;
  uint32_t checksum = 0;  // none
};

// CRC-32C of what is posted as entry `number` since the beginning: of an older one it is another. For a cancel the
// slot's words are 0.
inline uint32_t entry_checksum(uint32_t number, const Entry& entry, uint32_t request_bytes, uint32_t reply_room) {
  const uint32_t words[]{static_cast<uint32_t>(entry.slot),
                         static_cast<uint32_t>(entry.slot >> 32),
                         entry.kind,
                         number,
                         request_bytes,
                         reply_room};
  return crc32c(0, reinterpret_cast<const std::byte*>(words), sizeof words);
}

// Whether the other end must get a bell: its `flag` was 1, and is now 0.
template <class Memory>
bool claim_bell(const Memory& memory, uint64_t flag) {
  return memory.word(flag).load(std::memory_order_seq_cst) == 1 &&
         memory.word(flag).exchange(0, std::memory_order_seq_cst) == 1;
}

// Says that this end is about to sleep; what it waits for must be looked at once more after it.
template <class Memory>
void announce_sleep(const Memory& memory, uint64_t flag) {
  memory.word(flag).store(1, std::memory_order_seq_cst);
}

// Caller: hands over the slot's words, written before; whether a bell is due.
template <class Memory>
bool push(const Memory& memory, uint32_t entries, uint32_t tail, const Entry& entry) {
  const uint64_t at = kRing + tail % entries * kEntryBytes;
  memory.wide(at).store(entry.slot, std::memory_order_relaxed);
  memory.word(at + 8).store(entry.kind, std::memory_order_relaxed);
  memory.word(at + 12).store(entry.checksum, std::memory_order_relaxed);
  memory.word(kTail).store(tail + 1, std::memory_order_seq_cst);
  return claim_bell(memory, kAsleep);
}

// Server: the entry that is next, given that `tail` has passed it. It is the caller's again once `head` has.
template <class Memory>
Entry peek(const Memory& memory, uint32_t entries, uint32_t head) {
  const uint64_t at = kRing + head % entries * kEntryBytes;
  return {memory.wide(at).load(std::memory_order_relaxed), memory.word(at + 8).load(std::memory_order_relaxed),
          memory.word(at + 12).load(std::memory_order_relaxed)};
}

// Caller: makes a slot one to be posted. The request's bytes are written, too, before `push`.
template <class Memory>
void prepare(const Memory& memory, uint64_t slot, uint32_t request_bytes, uint32_t reply_room) {
  memory.word(slot + kRequestBytes).store(request_bytes, std::memory_order_relaxed);
  memory.word(slot + kReplyRoom).store(reply_room, std::memory_order_relaxed);
  memory.word(slot).store(kPosted, std::memory_order_relaxed);
}

// What a pair of the global expert adds to a receipt: MurmurHash3's finalizer of its number plus one.
constexpr uint32_t receipt_term(uint32_t expert) {
  uint32_t term = expert + 1;
  term = (term ^ term >> 16) * 0x85ebca6bu;
  term = (term ^ term >> 13) * 0xc2b2ae35u;
  return term ^ term >> 16;
}

// What a slot says of its answer.
struct Verdict {
  uint32_t reply_bytes = 0;
  uint32_t code = 0;
  uint32_t receipt = 0;
};

// Server: publishes a reply whose bytes are written; whether a thread must be woken.
template <class Memory>
bool finish(const Memory& memory, uint64_t slot, const Verdict& verdict) {
  memory.word(slot + kReplyBytes).store(verdict.reply_bytes, std::memory_order_relaxed);
  memory.word(slot + kCode).store(verdict.code, std::memory_order_relaxed);
  memory.word(slot + kReceipt).store(verdict.receipt, std::memory_order_relaxed);
  return memory.word(slot).exchange(kDone, std::memory_order_seq_cst) == kSleeping;
}

enum class Wait { kDone, kExpired, kInterrupted, kEnded, kUnknown, kForked };

// Caller: sleeps until the slot is done. `ended` is a word of this process that is set before `release`; `sleep(slot)`
// is FUTEX_WAIT on kSleeping and says kDone when it is worth looking again. A state that no server writes counts as an
// end.
template <class Memory, class Ended, class Sleep>
Wait await(const Memory& memory, uint64_t slot, const Ended& ended, Sleep&& sleep) {
  auto state = memory.word(slot);
  for (;;) {
    uint32_t now = state.load(std::memory_order_seq_cst);
    if (now == kPosted && !state.compare_exchange_strong(now, kSleeping, std::memory_order_seq_cst)) continue;
    if (now == kDone) return Wait::kDone;
    if (ended.load(std::memory_order_seq_cst) || (now != kPosted && now != kSleeping)) {
      // The answer may have come between the look at the state and the end.
      return state.load(std::memory_order_seq_cst) == kDone ? Wait::kDone : Wait::kEnded;
    }
    if (const Wait woken = sleep(slot); woken != Wait::kDone) return woken;
  }
}

// Caller, after `ended` was set and before FUTEX_WAKE: a thread that is about to sleep on the slot will not.
template <class Memory>
void release(const Memory& memory, uint64_t slot) {
  uint32_t sleeping = kSleeping;
  memory.word(slot).compare_exchange_strong(sleeping, kPosted, std::memory_order_seq_cst);
}

}  // namespace expertd
