// The engine: order, bounds, cancellation and endings of requests, on one thread.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/clock.h"
#include "base/owned.h"
#include "base/spin.h"
#include "engine/admission.h"
#include "engine/batch.h"
#include "engine/bell.h"
#include "engine/failpoints.h"
#include "engine/lanes.h"
#include "engine/pile.h"
#include "engine/queue.h"
#include "engine/sampler.h"
#include "engine/tally.h"
#include "request/message.h"
#include "request/placement.h"
#include "request/refusal.h"

namespace expertd {

// Whether the next batch starts now, with batches of `under_way` tokens computing and `waiting` tokens in the queue.
// Two small batches never overlap: the second waits and grows, which costs the device less than both.
bool may_start(const std::vector<uint64_t>& under_way, uint64_t waiting, size_t depth);

// Where an executor has a place for small batches, small requests wait apart, and join no large ones, behind whose
// tokens theirs would be computed.
enum class Next : uint8_t {
  kNothing,
  kLarge,   // of those that do not wait apart
  kSmall,   // of those that do, as many as there are
  kExpress  // of those that do, into their place
};
// What starts now, with batches of `under_way` tokens outside that place, and so many `large` tokens waiting, and so
// many `small` ones apart. These need not wait for large ones, which in turn do not give way to many of them.
Next next_batch(const std::vector<uint64_t>& under_way, bool express_is_free, uint64_t large, uint64_t small,
                size_t depth);

// Takes requests, decides their order, has them computed and answers them: on one thread, which never takes Python's
// lock.
class Engine : public Owned {
 public:
  // Between two requests its thread spins for `spin_ns` at most. What happens is counted in `tally`.
  Engine(PlacementPtr placement, uint64_t batch_tokens, Amount most_waiting, std::shared_ptr<Tally> tally,
         int64_t spin_ns = Spin::kAutoNs);
  ~Engine();  // stops; not to be called after a stop() that failed

  // From any thread -------------------------------------------------------------------------------------------------

  // Has tokens of answered requests sampled, before the first turn.
  void sample(std::shared_ptr<Sampler> sampler) { sampler_ = std::move(sampler); }
  // Has faults strike, before the first turn.
  void use_failpoints(std::shared_ptr<Failpoints> failpoints) { failpoints_ = std::move(failpoints); }
  // Says what computes, before the first turn.
  void use(std::shared_ptr<Executor> executor);
  // Starts the thread; without it a test turns.
  void start();
  // Ends the thread, once what others do for it is done. Jobs that are not answered by then never will be. False when
  // they do not come to an end within a second: they may go on, and all that they use must stay for ever.
  bool stop();
  // Looks for work now.
  void wake() { bell_.ring(); }
  // Waits until the thread has looked for work: a sign of its life, that may never come. Throws what a failpoint says.
  void await_turn();

  void open();
  // Refuses new requests with kUnavailable; those already accepted are still answered. Not yet `refusing`, only
  // closed_because() tells new callers.
  void close(std::string reason, bool refusing);
  // Answers everyone who waits, and refuses new requests, with kUnavailable. The memory of those that the device has
  // stays lent.
  void abandon(std::string reason);
  std::optional<std::string> closed_because() const;

  // Readable once the device is suspected of a failure; `take_fault` tells why, and makes it unreadable.
  int fault_fd() const { return fault_bell_.fd(); }
  std::optional<std::string> take_fault();

  PlacementPtr placement() const;
  // For requests that come from now on.
  void set_placement(PlacementPtr placement);
  // Whether requests may still use weights of placements before that of `epoch`. What a device that hangs has does not
  // count.
  bool uses_before(uint64_t epoch) const;

  // Checks a request whose tensors are in its message. Refuses what must not wait or be computed, or sets what of
  // `job`, whose identity is known, is known by then.
  std::optional<Refusal> check(const Message& message, Job* job);
  // The same in two steps for tensors in a lane's memory: what does not take long, and, on any thread, the rest.
  std::optional<Refusal> place(const Message& message, const Lane& lane, LaneJob* job);
  std::optional<Refusal> check_tensors(const Message& message, const Tensors& tensors, Job* job);
  // Lets a checked job wait. Refuses when there is no room.
  std::optional<Refusal> submit(std::shared_ptr<Job> job);
  // Answers a job with kCancelled: at once if it waits, else when the device is done with it.
  void cancel(std::shared_ptr<Job> job);

  // Why a request of this size would be refused now.
  std::optional<Refusal> check_room(const std::string& identity, Amount more) const;
  Amount waiting() const { return admission_.waiting(); }
  // What threads of the pool do for the engine now.
  size_t handed_out() const;

  Tally& tally() { return *tally_; }
  // Calls in shared memory.
  Lanes& lanes() { return lanes_; }
  // What every slot must leave for a reply.
  uint32_t min_reply_room() const;

  // The engine's thread ----------------------------------------------------------------------------------------------

  // Does what there is to do at `now`; whether there was anything.
  bool turn(uint64_t now);

 private:
  friend class Lanes;

  void run();
  // Whether to look again at once; then what was found, and sleeping.
  bool spins(uint64_t now);
  void sleep(uint64_t now);
  // Whether others than stranded jobs have it, for who has the lock.
  bool is_used(const PlacementPtr& earlier) const;
  std::optional<Refusal> check_head(const Message& message, Job* job);
  // As if the placement had changed.
  void begin_placement();
  // Where a job waits.
  FairQueue& queue_of(const Job& job);
  // Whether nothing waits or is under way.
  bool idle() const { return under_way_.empty() && queue_.empty() && small_.empty(); }
  // What starts now.
  Next next() const;
  void begin(Next what, uint64_t now);
  void start(std::unique_ptr<Batch> batch, uint64_t now);
  void finish(std::unique_ptr<Batch> batch, uint64_t now);
  // Answers those of a batch whose memory may be used for ever, and keeps it.
  void strand(std::unique_ptr<Batch> batch);
  void tell_fault(std::string fault);
  // Completes an answer, and tells its caller: here, or on a thread of the pool.
  void complete(std::shared_ptr<Job> job);
  void answer(Job& job);
  // Has a thread of the pool do what may take long.
  void hand_out(std::function<void()> work);
  void give_up();
  bool take_submissions();
  bool take_cancels();
  bool take_evicted();
  std::optional<Refusal> check_open() const;
  // `over`: nobody uses its memory any more.
  void refuse(Job& job, Refusal refusal, bool over = true);

  const uint64_t batch_tokens_;
  const std::shared_ptr<Tally> tally_;
  std::shared_ptr<Sampler> sampler_;        // or null
  std::shared_ptr<Failpoints> failpoints_;  // or null
  std::shared_ptr<Executor> executor_;
  Bell bell_, fault_bell_;
  std::thread thread_;
  std::atomic<uint64_t> turns_{0};
  std::atomic<bool> asked_{false};  // for a sign of life: something to find for a thread that is about to sleep
  std::atomic<bool> stopping_{false};

  mutable std::mutex handing_;  // of the three below
  size_t handed_out_ = 0;
  bool running_ = false;  // the thread
  bool lost_ = false;     // whether stop() failed: nothing is begun any more
  std::condition_variable handed_in_;

  Pile<std::shared_ptr<Job>> submitted_;
  Pile<std::shared_ptr<Job>> cancels_;
  Pile<Evicted> evicted_;
  std::atomic<bool> abandoned_{false};
  Admission admission_;

  mutable std::mutex mutex_;  // of the six below; never held while anything else is waited for
  std::optional<std::string> closed_because_;
  bool refusing_ = true;
  PlacementPtr placement_;
  std::vector<std::weak_ptr<const Placement>> earlier_;  // that somebody uses
  std::unordered_map<const Placement*, long> kept_;      // by how many stranded jobs
  std::optional<std::string> fault_;

  // The thread's alone.
  FairQueue queue_, small_;  // the second: of small requests, if the executor has a place for such
  Lanes lanes_;
  WorkSpin spin_;
  uint64_t looked_ns_ = 0;                      // for callers that left
  std::vector<Batch*> under_way_;               // until the executor gives them back
  std::list<std::unique_ptr<Batch>> starting_;  // those of them whose jobs are being given room
  std::vector<std::unique_ptr<Batch>> stranded_;
};

}  // namespace expertd
