// A caller that writes whatever it likes, whenever it likes, into all that it
// shares: the server's end lives on, ends lanes with reasons, and serves an
// honest lane beside them.
//
// usage: hostile SECONDS SEED
#include <atomic>
#include <random>
#include <thread>
#include <vector>

#include "ends.h"

namespace {

using namespace expertd;
using namespace expertd::testing;

constexpr size_t kSize = 1 << 18;

uint64_t nasty(std::mt19937_64 &random) {
  constexpr uint64_t kEdges[] = {
      0,          1,          2,          3,          4,          63,
      64,         4095,       4096,       4097,       kSize - 64, kSize,
      kSize + 64, 0x7fffffff, 0x80000000, 0xffffffff, ~0ul,       ~0ul - 63u,
      1ul << 63,  1ul << 32,  8192,       8256};
  return random() % 3   ? kEdges[random() % std::size(kEdges)]
         : random() % 2 ? random() % kSize / 64 * 64
                        : random();
}

// Writes to a mapping of its own of the same memory, as another process would;
// by words, as memory is torn.
void scribble(int memfd, int socket, uint64_t seed,
              const std::atomic<bool> &stop) {
  Mapping memory(memfd, kSize);
  Words words(memory.base());
  std::mt19937_64 random(seed);
  while (!stop) {
    const uint64_t slot = 8192 + random() % 64 * 1024;
    // Mostly almost good, so that lanes live long enough to be harmed.
    switch (random() % 64) {
    case 0:
      if (random() % 64 == 0)
        words.word(kTail).store(static_cast<uint32_t>(nasty(random)),
                                std::memory_order_relaxed);
      break;
    case 1:
      words.word(random() % 2 ? kAsleep : kLooping)
          .store(static_cast<uint32_t>(random() % 3),
                 std::memory_order_relaxed);
      break;
    case 2:
      words.word(slot + 4 * (random() % 4))
          .store(static_cast<uint32_t>(nasty(random)),
                 std::memory_order_relaxed);
      break;
    case 3:
      words.wide(random() % (kSize / 8) * 8)
          .store(nasty(random), std::memory_order_relaxed);
      break;
    case 4:
      words.word(kRing + random() % 64 * 16 + 8)
          .store(static_cast<uint32_t>(random() % 64 ? 1 + random() % 2
                                                     : nasty(random)));
      break;
    case 5:
      (void)!send(socket, "\0\1\2", 1 + random() % 3,
                  MSG_DONTWAIT | MSG_NOSIGNAL);
      break;
    default: { // an almost good post
      const uint32_t tail = words.word(kTail).load();
      if (tail - words.word(kHead).load() >= 64)
        break;
      const Echo echo{
          .at = random() % 4 ? slot + 512 : nasty(random),
          .up = static_cast<uint32_t>(random() % 2 ? 100 : nasty(random)),
          .down = static_cast<uint32_t>(random() % 2 ? 100 : nasty(random)),
          .held = static_cast<uint32_t>(random() % 2)};
      for (uint64_t at = 0; at < sizeof echo; at += 8) {
        uint64_t value;
        std::memcpy(&value, echo.bytes().data() + at, 8);
        words.wide(request_at(slot) + at)
            .store(value, std::memory_order_relaxed);
      }
      prepare(words, slot,
              random() % 64 ? sizeof echo
                            : static_cast<uint32_t>(nasty(random)),
              random() % 64 ? 1024 : static_cast<uint32_t>(nasty(random)));
      if (push(words, 64, tail,
               {random() % 64 ? slot : nasty(random),
                random() % 8 ? kRequest : kCancel})) {
        (void)!send(socket, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
      }
    }
    }
  }
}

} // namespace

int main(int, char **argv) {
  const int64_t end = in_ms(std::atoi(argv[1]) * 1000);
  std::mt19937_64 random(static_cast<uint64_t>(std::atoi(argv[2])));
  EchoServer server;
  auto honest = join(server, 1 << 20, 64);
  uint64_t calls = 0, lanes = 0;
  while (monotonic_ns() < end) {
    auto victim = std::make_unique<ClientLane>(kSize, 64);
    if (random() % 4 == 0)
      Words(victim->memory()->base())
          .wide(random() % 4 * 8)
          .store(nasty(random));
    const auto [here, there] = socket_pair();
    std::string reason;
    std::atomic<bool> stop{false};
    if (!server.add(std::make_shared<Mapping>(victim->descriptor(), kSize),
                    there, &reason)) {
      require(!reason.empty(), "a refusal has a reason");
      close(there);
      close(here);
      continue;
    }
    lanes++;
    std::thread writer(scribble, victim->descriptor(), here, random(),
                       std::cref(stop));
    const size_t reasons = server.reasons().size();
    for (int turn = 0; turn < 200 && server.reasons().size() == reasons;
         turn++) {
      server.turn(1);
      require(post(*honest, 1) == Post::kPosted, "an honest post");
      for (int i = 0;
           i < 8 && honest->wait(slot_of(*honest, 1), 0) != Wait::kDone; i++)
        server.turn(0);
      check_reply(*honest, 1);
      calls++;
    }
    stop = true;
    writer.join();
    close(here);
    for (int i = 0; i < 8 && server.lanes() > 1; i++)
      server.turn(1);
    require(server.lanes() == 1, "a lane that was left is gone");
  }
  std::printf("%lu lanes, %zu ended with a reason, %lu served, %lu honest "
              "calls beside them\n",
              lanes, server.reasons().size(), server.served(), calls);
  require(!server.reasons().empty() && calls, "something happened");
}
