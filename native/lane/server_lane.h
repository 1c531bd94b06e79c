// The server's end of a lane.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "lane/connection.h"
#include "lane/mapping.h"
#include "lane/ring.h"

namespace expertd {

// What was taken from a ring, checked: all its places are inside of the mapping. Of a cancellation only the slot has a
// meaning.
struct Posted {
  uint64_t slot = 0;
  uint32_t kind = kRequest;
  uint32_t request_bytes = 0;
  uint64_t reply = 0;
  uint32_t reply_room = 0;
};

// The server's end of a lane; ring.h has the rules. Nothing in it waits, and nothing that the caller does harms it: the
// worst is that the lane ends with a reason. Threads: everything is the engine's thread's, but `shut_down`, which is
// anyone's. It lives until its last request is answered and its last batch fetched, whether the caller is there or not.
class ServerLane {
 public:
  // Takes the memory and the socket of a handover, after the ticket and the seals were checked and the caller was told
  // so. `min_room` bytes at least must callers leave for a reply. Null with a `reason` if the geometry is wrong; the
  // socket then stays its owner's.
  static std::unique_ptr<ServerLane> attach(std::shared_ptr<Mapping> memory, int socket, uint32_t min_room,
                                            std::string* reason);

  // Fills `out` with what is posted, requests as far as `entries` are in flight; returns how many. None once it has
  // ended.
  size_t take(std::span<Posted> out);
  // The bytes of a request, copied once, so that they can be looked at. `out` has kMaxRequestBytes.
  std::string_view message(const Posted& posted, std::span<char> out) const;
  // Ends a request that was taken: `reply`, of at most `reply_room` bytes, and the sums are there from now on. `code`
  // is its error's, or 0 beside a `receipt` (see ring.h). Once the lane has ended, answers still count.
  void answer(const Posted& posted, std::string_view reply, uint32_t code = 0, uint32_t receipt = 0);

  // To be called on every lane before the engine sleeps: false if there is something to take. Afterwards a post rings.
  bool arm();
  // When the engine is awake: posts need no bell.
  void disarm();
  // When the socket is readable. False once the caller has left: what it has in flight is to be cancelled.
  bool drain() { return connection_.drain(); }

  // No more is taken. `message`, an encoded ExecuteResponse, tells the caller why.
  void end(std::string_view message);
  // Ends the connection, so that the caller learns of it even while the engine's thread hangs. Any thread.
  void shut_down() const { connection_.shut_down(); }

  // What the caller did that ended the lane, for people; empty as long as it did nothing. `end` has then to follow.
  const std::string& reason() const { return reason_; }
  uint32_t in_flight() const { return in_flight_; }
  // Whether posts ring no bell, as a GPU makes them.
  bool posted_by_gpu() const { return posted_by_gpu_; }
  int socket() const { return connection_.descriptor(); }
  // Where tensors may be: [data, size) of the mapping.
  const Mapping& memory() const { return *memory_; }
  uint64_t data() const { return data_; }

 private:
  ServerLane(std::shared_ptr<Mapping> memory, int socket, uint32_t min_room, uint32_t entries, uint64_t data);
  bool check(const Entry& entry, Posted* posted);
  bool check_sum(const Entry& entry, uint32_t request_bytes, uint32_t reply_room);
  bool fail(std::string reason);

  std::shared_ptr<Mapping> memory_;
  Connection connection_;
  Words words_;
  const uint32_t min_room_;
  const uint32_t entries_;
  const uint64_t data_;
  const bool posted_by_gpu_;
  uint32_t head_ = 0;
  uint32_t in_flight_ = 0;
  bool ended_ = false;
  std::string reason_;
};

}  // namespace expertd
