// The caller's end of a lane.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/owned.h"
#include "base/spin.h"
#include "lane/connection.h"
#include "lane/descriptor.h"
#include "lane/free_list.h"
#include "lane/mapping.h"
#include "lane/ring.h"

namespace expertd {

enum class Post { kPosted, kFull, kMisplaced, kEnded, kForked };

// A part of a lane's memory.
struct Room {
  uint64_t at = 0, bytes = 0;
};
// Of a call: for its slot and tensors, and for sums that lie elsewhere.
using Rooms = std::array<Room, 2>;

// The caller's end of a lane; ring.h has the rules. Where slots and tensors are in the memory is its user's to say.
// Threads: all functions may be called by any thread at once, but `poll`, which is the loop's that watches the socket,
// and there must be one: it learns of the end and releases the threads that sleep in `wait`. A call is waited for by
// one thread, or by the loop. In a forked child everything says kForked, and destruction only closes.
class ClientLane : public Owned {
 public:
  // New memory of `size` bytes, that is `data` and what slots need, with a ring of `entries`. Throws std::system_error,
  // and std::invalid_argument for sizes that no lane has.
  // With `poster` kGpu nothing is posted by `post`: a GPU does all of ring.h, and `nudge` rings for it.
  ClientLane(size_t size, uint32_t entries, SpinHost& host = SpinHost::here(), int64_t spin_ns = Spin::kAutoNs,
             uint32_t poster = kHost);
  ~ClientLane();

  // The memory's file, to be handed over; the lane's own.
  int descriptor() const { return memfd_.get(); }
  // The handover was accepted: takes the socket. Before that nothing can be posted.
  void connect(int socket);

  // Memory for slots and tensors: where it is, a multiple of 64, or nothing when there is none.
  std::optional<uint64_t> take(uint64_t bytes);
  // Its user's no longer, and not the server's.
  void give_back(Room room);
  uint64_t free_bytes() const;

  // Announces the request in `slot`, with room for a reply of `reply_room` bytes; the tensors are in place. From now on
  // slot and tensors are the server's until the call is done, or for good once the lane has ended. kFull: there is no
  // room in the ring or too much in flight. With `looped`, `poll` names it when it is done.
  Post post(uint64_t slot, std::string_view request, uint32_t reply_room, bool looped);
  // Wakes a server that sleeps: a GPU is about to post. Any thread.
  void nudge() const;
  // Until the call is done, `deadline_ns` of the monotonic clock has come, a signal came, or the lane has ended without
  // it; kUnknown at once for a slot without a call.
  Wait wait(uint64_t slot, int64_t deadline_ns);
  bool done(uint64_t slot) const;
  // The reply to a call that is done, which is no longer in flight; none if it is not done, or its length is
  // impossible.
  std::optional<std::string> reply(uint64_t slot);
  // The answer is not wanted any more. The slot stays the server's until `reap` names it; false if it is free already.
  // Not told to a server with a full ring.
  bool cancel(uint64_t slot);
  // The same for the last who knows of the call: its rooms, the first with bytes, are given back when it is done, and
  // `reap` does not name it.
  void abandon(uint64_t slot, const Rooms& rooms);
  // Cancelled calls that are done: their slots are free.
  std::vector<uint64_t> reap();
  // For the loop, after its posts and when the socket is readable: looped calls that are done. Unless the lane has
  // ended, the socket is readable again when there are more.
  std::vector<uint64_t> poll();

  // Ends the lane, for both sides: calls in flight that are not done are lost.
  void close();
  bool ended() const { return ended_.load(std::memory_order_seq_cst); }
  // Why the server ended it: an encoded ExecuteResponse, or empty. The loop's.
  std::string reason() const { return std::string(connection_.value().reason()); }
  bool forked() const { return !here(); }

  int socket() const { return connection_.value().descriptor(); }
  const std::shared_ptr<Mapping>& memory() const { return memory_; }
  uint64_t data() const { return data_at(entries_); }
  size_t in_flight() const;

 private:
  struct Call {
    uint64_t reply;
    uint32_t reply_room;
    bool looped;
    bool cancelled;
    int64_t posted_ns;
    Rooms rooms{};  // that are given back once a cancelled call is done; without bytes they are its user's
    bool abandoned() const { return cancelled && rooms[0].bytes != 0; }
  };
  bool announce(Entry entry, uint32_t request_bytes = 0, uint32_t reply_room = 0);
  void spin(uint64_t slot);
  bool cancel_call(uint64_t slot, const Rooms& rooms);
  void reap_abandoned();
  void take_back(const Rooms& rooms);

  const uint32_t entries_;
  const Descriptor memfd_;
  std::shared_ptr<Mapping> memory_;
  Words words_;
  Spin spin_;
  std::optional<Connection> connection_;
  std::atomic<bool> ended_{false};
  mutable std::mutex posting_;  // one producer at a time; never held while anything waits
  uint32_t tail_ = 0;
  std::unordered_map<uint64_t, Call> calls_;  // by slot, with those cancelled
  FreeList free_;
};

}  // namespace expertd
