// What a call of one token's bytes costs between two processes: over a lane,
// and over a socket for comparison.
//
// usage: exchange CALLS     medians and p99 in microseconds, back to back and
// after 1 ms of rest
#include <signal.h>
#include <sys/wait.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "ends.h"

namespace {

using namespace expertd;
using namespace expertd::testing;

void measure(const char* name, int calls, const std::function<void()>& call) {
  for (const int rest_us : {0, 1000}) {
    std::vector<double> took;
    for (int i = 0; i < (rest_us ? std::min(calls, 1000) : calls); i++) {
      if (rest_us) usleep(rest_us);
      const int64_t begin = monotonic_ns();
      call();
      took.push_back(static_cast<double>(monotonic_ns() - begin) / 1e3);
    }
    std::sort(took.begin(), took.end());
    std::printf("%s, %s: p50 %.1f us, p99 %.1f us, %zu calls\n", name, rest_us ? "after 1 ms" : "back to back",
                took[took.size() / 2], took[took.size() * 99 / 100], took.size());
  }
}

void transfer(int socket, std::vector<char>& bytes, bool out) {
  for (size_t at = 0; at < bytes.size();) {
    const ssize_t count =
        out ? write(socket, &bytes[at], bytes.size() - at) : read(socket, &bytes[at], bytes.size() - at);
    if (count <= 0) _exit(0);
    at += static_cast<size_t>(count);
  }
}

void over_socket(int calls) {
  const auto [here, there] = socket_pair();
  std::vector<char> up(kUp), down(kDown);
  const pid_t child = fork();
  if (child == 0) {
    close(here);
    for (;;) {
      transfer(there, up, false);
      transfer(there, down, true);
    }
  }
  close(there);
  measure("unix socket", calls, [&] {
    transfer(here, up, true);
    transfer(here, down, false);
  });
  close(here);
  waitpid(child, nullptr, 0);
}

void over_lane(int calls) {
  const auto [here, there] = socket_pair();
  const pid_t child = fork();
  if (child == 0) {
    close(here);
    EchoServer server;
    std::string reason;
    const int memfd = receive_descriptor(there);
    require(server.add(std::make_shared<Mapping>(memfd, 1 << 20), there, &reason), reason.c_str());
    while (server.lanes()) server.turn(-1);
    _exit(0);
  }
  close(there);
  ClientLane lane(1 << 20, 64);
  send_descriptor(here, lane.descriptor());
  lane.connect(here);
  std::vector<char> up(kUp, 7), down(kDown);
  const uint64_t slot = slot_of(lane, 7);
  const Echo echo{.at = slot + kSlotBytes, .up = kUp, .down = kDown};
  std::byte* tensors = lane.memory()->base() + echo.at;
  measure("lane", calls, [&] {
    std::memcpy(tensors, up.data(), kUp);
    require(lane.post(slot, echo.bytes(), 1024, false) == Post::kPosted, "a post");
    require(lane.wait(slot, in_ms(10'000)) == Wait::kDone, "an answer");
    require(Echo::from(*lane.reply(slot)).sum == 7 * kUp, "the sum");
    std::memcpy(down.data(), tensors + kUp, kDown);
  });
  lane.close();
  waitpid(child, nullptr, 0);
}

}  // namespace

int main(int, char** argv) {
  const int calls = std::atoi(argv[1]);
  over_socket(calls);
  over_lane(calls);
}
