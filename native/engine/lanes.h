// The lanes of an engine: what callers post in shared memory becomes its jobs.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/bell.h"
#include "engine/job.h"
#include "engine/pile.h"
#include "lane/server_lane.h"
#include "request/segment.h"

namespace expertd {

class Engine;
class LaneJob;

// One caller's lane, and its jobs.
struct Lane {
  uint64_t number = 0;
  std::unique_ptr<ServerLane> ring;
  Segment segment;
  Reach reach = Reach::kPageable;    // of the host's memory
  Reach gpu_reach = Reach::kDevice;  // of the GPU's
  std::string identity, caller;
  std::unordered_map<uint64_t, std::shared_ptr<LaneJob>> jobs;  // by slot, until nobody uses their memory
  std::atomic<bool> cut{false};                                 // by us: what is not answered yet is lost
  bool closing = false;                                         // nothing more is taken: it is over with its last job

  // Whether what it posts must be looked for.
  bool is_silent() const { return !closing && ring->posted_by_gpu(); }
};

// All lanes of an engine. All but the first group of functions is for the engine's thread.
class Lanes {
 public:
  explicit Lanes(Engine& engine);
  ~Lanes();

  // From any thread -------------------------------------------------------------------------------------------------

  // The number of a new lane, which the engine serves from its next turn on.
  uint64_t add(std::shared_ptr<Lane> lane);
  // Takes nothing more; each lane is over once what it posted is answered.
  void drain() { draining_.store(true); }
  // Ends every lane's connection, even while the engine hangs.
  void disconnect();
  // In a forked child: closes them, which the parent goes on to use.
  void close();
  // Readable when there is something for `take_over`: the numbers of lanes that are over, whose memory nobody uses.
  int over_fd() const { return over_bell_.fd(); }
  std::vector<uint64_t> take_over();
  // Has the engine's thread do something.
  void call_back(std::function<void()> work);

  // The engine's thread ---------------------------------------------------------------------------------------------

  // Takes what was posted, and lets go of lanes that are over; whether there was anything.
  bool turn();
  // Before a sleep: false if there is something to take.
  bool arm();
  void disarm();
  // Sleeps until a caller or `bell` rings, for at most `ns`; less than 0: for any time. Takes note of who has left.
  void sleep(int64_t ns);

 private:
  void watch(int descriptor, void* lane);
  // How many entries there were.
  size_t take(const std::shared_ptr<Lane>& lane);
  void take_one(const std::shared_ptr<Lane>& lane, const Posted& posted);
  // Lets a checked job wait, or answers it.
  void admit(const std::shared_ptr<LaneJob>& job, std::optional<Refusal> refusal);
  void leave(Lane& lane);
  void close(Lane& lane, const std::string& reason);

  Engine& engine_;
  const int epoll_;
  std::array<Posted, 64> posted_;  // of one lane in one turn, so that none keeps the others waiting
  Bell over_bell_;
  std::atomic<uint64_t> last_number_{0};
  std::atomic<bool> draining_{false};
  std::atomic<bool> has_added_{false};
  bool rung_ = false;  // by a caller whose GPU is about to post
  Pile<uint64_t> over_;
  Pile<std::function<void()>> called_back_;

  std::mutex mutex_;  // of all below; the engine's thread, which alone changes `lanes_`, reads it without
  std::vector<std::shared_ptr<Lane>> added_;  // what it has not seen yet
  std::vector<std::shared_ptr<Lane>> lanes_;
};

// A request that lies in a lane's slot, and is answered there: on the engine's thread.
class LaneJob final : public Job, public std::enable_shared_from_this<LaneJob> {
 public:
  LaneJob(Lanes& lanes, std::shared_ptr<Lane> lane, const Posted& posted)
      : lanes_(lanes), lane_(std::move(lane)), posted_(posted) {}

  void make_room() override { put_reply(reply); }  // the caller's
  void complete() override;
  bool is_slow() const override { return false; }
  bool is_slow_to_complete() const override;
  void settle(Outcome outcome) override;
  bool disconnect() override;
  // What was not admitted.
  void turn_away(const Refusal& refusal);

  uint64_t request_id = 0, layer = 0;  // as its message says, whatever is wrong with it
  std::string received;                // its message, where that is needed for longer
  Tensors tensors;
  std::string copied;  // of its tensors, what was checked

 private:
  bool sums_are_checked() const { return request.checked && !is_on_device(reach); }
  void leave();
  uint32_t receipt() const;

  Lanes& lanes_;
  const std::shared_ptr<Lane> lane_;
  const Posted posted_;
  uint32_t checksum_ = 0;
};

}  // namespace expertd
