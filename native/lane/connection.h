// The socket beside a lane: bells, and the end of either process.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "lane/descriptor.h"

namespace expertd {

// One end of a lane's stream socket, which it owns: bells, at last a reason, and the end. Nothing in it waits. Its
// destruction only closes, as a forked child does that, too.
class Connection {
 public:
  explicit Connection(int socket) : socket_(socket) {}
  int descriptor() const { return socket_.get(); }
  // Any thread. A bell that finds no room is not needed: as many wait unread.
  void ring() const;
  // Any thread: ends the connection for both sides; both find it ended.
  void shut_down() const;
  // Why the lane ends, an encoded ExecuteResponse; then the end.
  void send_reason(std::string_view message) const;
  // Takes bells, a bounded number. False once the other side has ended the connection. One thread at a time.
  bool drain();
  // The reason that the other side gave, complete or empty.
  std::string_view reason() const;

 private:
  void take(std::string_view bytes);

  Descriptor socket_;
  bool ended_ = false;
  std::string reason_;  // from its first byte, kReason, on
};

}  // namespace expertd
