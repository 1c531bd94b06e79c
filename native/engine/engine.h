// The engine: order, bounds, cancellation and endings of requests, on one thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "engine/batch.h"
#include "engine/bell.h"
#include "engine/inbox.h"
#include "engine/pile.h"
#include "engine/queue.h"
#include "request/message.h"
#include "request/placement.h"
#include "request/refusal.h"

namespace expertd {

uint64_t monotonic_ns();

// Whether the next batch starts now, with batches of `under_way` tokens computing and `waiting` tokens in the queue.
// Two small batches never overlap: the second waits and grows, which costs the device less than both.
bool may_start(const std::vector<uint64_t>& under_way, uint64_t waiting, size_t depth);

// How much may wait, in total.
struct Bounds {
  uint64_t batch_tokens = 0;
  uint64_t queued_tokens = 0;
  uint64_t queued_bytes = 0;
};

// Takes requests, decides their order, has them computed and answers them: on one thread, which never takes Python's
// lock.
class Engine {
 public:
  Engine(PlacementPtr placement, Bounds bounds, std::unique_ptr<Executor> executor);
  ~Engine();  // stops

  // From any thread -------------------------------------------------------------------------------------------------

  // Starts the thread; without it a test turns.
  void start();
  // Ends the thread. Jobs that are not answered by then never will be.
  void stop();
  // Looks for work now.
  void wake() { bell_.ring(); }

  void open();
  // Refuses new requests with kUnavailable; those already accepted are still answered. Not yet `refusing`, only
  // closed_because() tells new callers.
  void close(std::string reason, bool refusing);
  // Answers everyone who waits, and refuses new requests, with kUnavailable. The memory of those that the device has
  // stays lent.
  void abandon(std::string reason);
  std::optional<std::string> closed_because() const;

  PlacementPtr placement() const;
  // For requests that come from now on.
  void set_placement(PlacementPtr placement);

  // Checks a request whose tensors are in its message. Refuses what must not wait or be computed, or sets
  // `job->request`.
  std::optional<Refusal> check(const Message& message, Job* job) const;
  // Lets an admitted job wait, `job->inbox` and `ticket` being set. Refuses when there is no room.
  std::optional<Refusal> submit(std::shared_ptr<Job> job);
  // Answers a job with kCancelled: at once if it waits, else when the device is done with it.
  void cancel(std::shared_ptr<Job> job);

  // Why a request of this size would be refused now.
  std::optional<Refusal> check_room(uint64_t tokens, uint64_t bytes) const;
  uint64_t queued_tokens() const { return queued_tokens_.load(std::memory_order_relaxed); }
  uint64_t queued_bytes() const { return queued_bytes_.load(std::memory_order_relaxed); }

  // The engine's thread ----------------------------------------------------------------------------------------------

  // Does what there is to do at `now`; whether there was anything.
  bool turn(uint64_t now);

 private:
  void run();
  void begin(uint64_t now);
  void finish(std::unique_ptr<Batch> batch, uint64_t now);
  void give_up();
  bool take_submissions();
  bool take_cancels();
  void release_room(const Job& job);
  void refuse(std::shared_ptr<Job> job, Refusal refusal);
  Refusal overloaded(std::string text, uint64_t tokens, uint64_t room) const;

  const Bounds bounds_;
  const std::unique_ptr<Executor> executor_;
  Bell bell_;
  std::thread thread_;
  std::atomic<bool> stopping_{false};

  Pile<std::shared_ptr<Job>> submitted_;
  Pile<std::shared_ptr<Job>> cancels_;
  std::atomic<bool> abandoned_{false};
  std::atomic<uint64_t> queued_tokens_{0}, queued_bytes_{0};  // from submit() until a batch or a refusal
  std::atomic<double> tokens_per_second_{0};

  mutable std::mutex mutex_;  // of the three below; never held while anything else is waited for
  std::optional<std::string> closed_because_;
  bool refusing_ = true;
  PlacementPtr placement_;

  // The thread's alone.
  FairQueue queue_;
  std::vector<Batch*> under_way_;  // the executor's, until it gives them back
};

}  // namespace expertd
