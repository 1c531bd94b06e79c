#pragma once

#include <sys/epoll.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "lane/server_lane.h"

namespace expertd::testing {

// A request of these tests: read `up` bytes at `at`, write `down` bytes after
// them, answer with this and the sum of what was read; or, with `held`, answer
// only once it is cancelled.
struct Echo {
  uint64_t at = 0;
  uint32_t up = 0, down = 0, held = 0, sum = 0;

  std::string_view bytes() const { return {reinterpret_cast<const char*>(this), sizeof *this}; }
  static Echo from(std::string_view bytes) {
    Echo echo;
    std::memcpy(&echo, bytes.data(), std::min(sizeof echo, bytes.size()));
    return echo;
  }
};

// What an engine does with its lanes, in turns of one thread.
class EchoServer {
 public:
  static constexpr uint32_t kMinRoom = 1024;

  EchoServer() : epoll_(epoll_create1(EPOLL_CLOEXEC)) {}
  ~EchoServer() { close(epoll_); }

  // Ends callers' lanes with `reason` in it when it is refused.
  bool add(std::shared_ptr<Mapping> memory, int socket, std::string* reason) {
    auto lane = ServerLane::attach(std::move(memory), socket, kMinRoom, reason);
    if (!lane) return false;
    epoll_event event{.events = EPOLLIN, .data = {.ptr = lane.get()}};
    epoll_ctl(epoll_, EPOLL_CTL_ADD, socket, &event);
    lanes_.try_emplace(lane.get(), std::move(lane));
    return true;
  }

  // One turn; without work it sleeps for at most `timeout_ms`.
  void turn(int timeout_ms) {
    bool worked = false;
    for (auto& [key, lane] : lanes_) worked |= serve(*lane);
    bool idle = !worked;
    for (auto& [key, lane] : lanes_) idle = idle && lane->arm();
    std::array<epoll_event, 16> events;
    const int count = epoll_wait(epoll_, events.data(), events.size(), idle ? timeout_ms : 0);
    for (auto& [key, lane] : lanes_) lane->disarm();
    for (int i = 0; i < count; i++) {
      auto* lane = static_cast<ServerLane*>(events[static_cast<size_t>(i)].data.ptr);
      if (!lane->drain()) leave(*lane);
    }
  }

  size_t lanes() const { return lanes_.size(); }
  uint64_t served() const { return served_; }
  const std::vector<std::string>& reasons() const { return reasons_; }
  // Ends all connections as a server does that stops.
  void stop() {
    for (auto& [key, lane] : lanes_) lane->end("stopped");
  }

 private:
  bool serve(ServerLane& lane) {
    std::array<Posted, 64> posted;
    const size_t count = lane.take(posted);
    for (size_t i = 0; i < count; i++) {
      if (posted[i].kind == kCancel) {
        cancel(lane, posted[i].slot);
      } else {
        respond(lane, posted[i]);
      }
    }
    if (lane.reason().empty() || ended_.contains(&lane)) return count > 0;
    reasons_.push_back(lane.reason());
    ended_.insert(&lane);
    lane.end(lane.reason());
    return true;
  }

  void respond(ServerLane& lane, const Posted& posted) {
    std::array<char, kMaxRequestBytes> copy;
    const std::string_view message = lane.message(posted, copy);
    Echo echo = Echo::from(message);
    const uint64_t size = lane.memory().size(), length = uint64_t{echo.up} + echo.down;
    if (message.size() != sizeof echo || echo.at < lane.data() || echo.at > size || length > size - echo.at) {
      return lane.answer(posted, "a bad request");
    }
    if (echo.held) {
      held_.emplace(std::pair(&lane, posted.slot), posted);
      return;
    }
    std::byte* up = lane.memory().base() + echo.at;
    received_.assign(up, up + echo.up);
    for (const std::byte byte : received_) echo.sum += static_cast<uint32_t>(byte);
    std::memset(up + echo.up, 'd', echo.down);
    served_++;
    lane.answer(posted, echo.bytes());
  }

  void cancel(ServerLane& lane, uint64_t slot) {
    const auto found = held_.find({&lane, slot});
    if (found == held_.end()) return;
    lane.answer(found->second, "cancelled");
    held_.erase(found);
  }

  void leave(ServerLane& lane) {
    std::erase_if(held_, [&lane](const auto& held) { return held.first.first == &lane; });
    ended_.erase(&lane);
    epoll_ctl(epoll_, EPOLL_CTL_DEL, lane.socket(), nullptr);
    lanes_.erase(&lane);
  }

  const int epoll_;
  std::map<ServerLane*, std::unique_ptr<ServerLane>> lanes_;
  std::map<std::pair<ServerLane*, uint64_t>, Posted> held_;
  std::set<ServerLane*> ended_;
  std::vector<std::string> reasons_;
  std::vector<std::byte> received_;
  uint64_t served_ = 0;
};

}  // namespace expertd::testing
