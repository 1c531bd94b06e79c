// Both ends in one process, on one mapping, from several threads: for
// ThreadSanitizer, which sees what memory orders are missing.
//
// usage: race CALLS
#include <atomic>
#include <thread>
#include <vector>

#include "ends.h"

using namespace expertd;
using namespace expertd::testing;

int main(int, char** argv) {
  const auto calls = static_cast<uint32_t>(std::atoi(argv[1]));
  constexpr uint32_t kThreads = 3;
  EchoServer server;
  auto lane = join(server, 1 << 20, 64);
  std::thread engine([&] {
    while (server.lanes()) server.turn(-1);
  });
  std::vector<std::thread> callers;
  for (uint32_t index = 0; index < kThreads; index++) {
    callers.emplace_back([&, index] {
      for (uint32_t i = 0; i < calls; i++) {
        const bool held = i % 16 == 0;
        require(post(*lane, index, false, held) == Post::kPosted, "a post");
        if (held) lane->cancel(slot_of(*lane, index));
        require(lane->wait(slot_of(*lane, index), in_ms(60'000)) == Wait::kDone, "an answer");
        if (!held) check_reply(*lane, index);
        while (held && lane->in_flight() && !lane->reply(slot_of(*lane, index))) {
        }
      }
    });
  }
  // The loop's calls, and the sleep on its socket.
  for (uint32_t i = 0; i < calls; i++) {
    require(post(*lane, kThreads, true) == Post::kPosted, "a looped post");
    while (lane->poll().empty()) {
      char byte;
      require(recv(lane->socket(), &byte, 1, MSG_PEEK) == 1, "a bell");
    }
    check_reply(*lane, kThreads);
  }
  for (auto& caller : callers) caller.join();
  // The end, while a thread sleeps on a call that is never answered.
  require(post(*lane, 0, false, 1) == Post::kPosted, "a last post");
  std::thread sleeper([&] { require(lane->wait(slot_of(*lane, 0), in_ms(60'000)) == Wait::kEnded, "an end"); });
  usleep(20'000);
  lane->close();
  sleeper.join();
  engine.join();
  std::printf("served: %lu\n", server.served());
}
