// One end is killed at each of its instructions, or stopped: the other goes on.
//
// usage: kills caller|server STRIDE | stops
#include <fcntl.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

#include <functional>
#include <thread>

#include "ends.h"

namespace {

using namespace expertd;
using namespace expertd::testing;

constexpr size_t kSize = 1 << 17;

// A child that lets itself be traced, and stops before `work`.
pid_t start(const std::function<void()>& prepare, const std::function<void()>& work) {
  const pid_t child = fork();
  if (child) return child;
  ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
  prepare();
  raise(SIGSTOP);
  work();
  _exit(0);
}

// Lets it do `steps` instructions and kills it; false if it had ended before.
bool kill_after(pid_t child, int steps) {
  int status = 0;
  waitpid(child, &status, 0);
  for (int i = 0; i < steps && WIFSTOPPED(status); i++) {
    ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr);
    waitpid(child, &status, 0);
  }
  if (WIFEXITED(status)) return false;
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  return true;
}

// Kills at 0, stride, 2 stride ... instructions until the work comes to its
// end; returns how often.
int sweep(int stride, const std::function<bool(int)>& kill_once) {
  int kills = 0;
  while (kill_once(kills * stride)) kills++;
  return kills;
}

// A call that two processes' ends make in this one, to see that the server is
// well.
void call(EchoServer& server, ClientLane& lane) {
  require(post(lane, 1) == Post::kPosted, "a post");
  for (int i = 0; i < 8 && lane.wait(slot_of(lane, 1), 0) != Wait::kDone; i++) server.turn(0);
  check_reply(lane, 1);
}

// The caller dies between the first look at its slot and its answer; the server
// serves another.
int kill_callers(int stride) {
  EchoServer server;
  auto other = join(server, kSize, 64);
  return sweep(stride, [&](int steps) {
    const auto [here, there] = socket_pair();
    std::unique_ptr<ClientLane> lane;
    const pid_t child = start(
        [&, to = there] {
          lane = std::make_unique<ClientLane>(kSize, 64);
          send_descriptor(to, lane->descriptor());
          lane->connect(to);
        },
        [&] {
          require(post(*lane, 2, false, 0, 256, 256) == Post::kPosted, "a post");
          require(post(*lane, 3, false, 1, 256, 256) == Post::kPosted, "a held post");
          lane->cancel(slot_of(*lane, 3));
          lane->wait(slot_of(*lane, 2), monotonic_ns());
        });
    close(there);
    std::string reason;
    const int memfd = receive_descriptor(here);
    require(server.add(std::make_shared<Mapping>(memfd, kSize), here, &reason), reason.c_str());
    close(memfd);
    const uint64_t before = server.served();
    server.turn(0);  // asleep, so that posts ring
    const bool killed = kill_after(child, steps);
    for (int i = 0; i < 4; i++) server.turn(0);
    call(server, *other);
    require(server.lanes() == 1, "the dead caller's lane is gone");
    require(server.served() <= before + 2 && server.reasons().empty(), "what was posted was whole");
    return killed;
  });
}

// The server dies in a turn, while a thread waits for the answer: it gets it,
// or learns of the end.
int kill_servers(int stride) {
  int done = 0;
  const int kills = sweep(stride, [&](int steps) {
    ClientLane lane(kSize, 64);
    const auto [here, there] = socket_pair();
    lane.connect(here);
    EchoServer server;
    const pid_t child = start(
        [&, from = there] {
          close(here);
          std::string reason;
          require(server.add(std::make_shared<Mapping>(lane.descriptor(), kSize), from, &reason), reason.c_str());
        },
        [&] { server.turn(0); });
    close(there);
    require(post(lane, 2, false, 0, 256, 256) == Post::kPosted, "a post");
    Wait how = Wait::kExpired;
    std::thread sleeper([&] { how = lane.wait(slot_of(lane, 2), in_ms(20'000)); });
    const Words words(lane.memory()->base());
    while (words.word(slot_of(lane, 2)).load() == kPosted) usleep(20);
    const bool killed = kill_after(child, steps);
    while (!lane.ended()) lane.poll();
    sleeper.join();
    require(how == Wait::kDone || how == Wait::kEnded, "the sleeper learns of the end");
    if (how == Wait::kDone) check_reply(lane, 2, 256, 256);
    done += how == Wait::kDone;
    return killed;
  });
  require(done > 0 && done <= kills, "some died before the answer, some after");
  return kills;
}

void stops() {
  const auto [here, there] = socket_pair();
  EchoServer own;
  auto other = join(own, kSize, 64);
  // A server that is stopped costs its callers their deadlines; another
  // server's calls go on, and it may come back.
  ClientLane lane(kSize, 64);
  const pid_t child = fork();
  if (child == 0) {
    close(here);
    EchoServer server;
    std::string reason;
    require(server.add(std::make_shared<Mapping>(lane.descriptor(), kSize), there, &reason), reason.c_str());
    while (server.lanes()) server.turn(-1);
    _exit(0);
  }
  close(there);
  lane.connect(here);
  kill(child, SIGSTOP);
  waitpid(child, nullptr, WUNTRACED);
  require(post(lane, 2) == Post::kPosted, "a post to a stopped server");
  for (int i = 0; i < 100; i++) call(own, *other);
  require(lane.wait(slot_of(lane, 2), in_ms(50)) == Wait::kExpired, "a deadline");
  kill(child, SIGCONT);
  require(lane.wait(slot_of(lane, 2), in_ms(10'000)) == Wait::kDone, "an answer after all");
  check_reply(lane, 2);
  lane.close();
  waitpid(child, nullptr, 0);
  // A caller that is stopped, or reads no answers, costs a server nothing.
  const auto [ours, theirs] = socket_pair();
  const pid_t caller = fork();
  if (caller == 0) {
    close(ours);
    ClientLane posting(kSize, 64);
    send_descriptor(theirs, posting.descriptor());
    posting.connect(theirs);
    for (uint32_t index = 1; index < 5; index++) post(posting, index, true);
    raise(SIGSTOP);
    _exit(0);
  }
  close(theirs);
  std::string reason;
  require(own.add(std::make_shared<Mapping>(receive_descriptor(ours), kSize), ours, &reason), reason.c_str());
  waitpid(caller, nullptr, WUNTRACED);
  const uint64_t before = own.served();
  for (int i = 0; i < 100; i++) call(own, *other);
  require(own.served() == before + 104, "its calls were answered");
  kill(caller, SIGKILL);
  waitpid(caller, nullptr, 0);
  own.turn(1000);
  require(own.lanes() == 1, "it is gone");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argv[1];
  if (what == "stops") {
    stops();
  } else {
    const int stride = argc > 2 ? std::atoi(argv[2]) : 1;
    std::printf("kills: %d\n", what == "caller" ? kill_callers(stride) : kill_servers(stride));
  }
}
