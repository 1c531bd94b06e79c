// What an engine did, counted.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "base/owned.h"
#include "engine/batch.h"
#include "engine/callers.h"
#include "engine/job.h"
#include "request/refusal.h"

namespace expertd {

// The stages of an answered request: those of its reply, completing the answer, and all from its arrival on.
inline constexpr size_t kStages = 7, kCompute = 3, kTotal = 6;
using Stages = std::array<double, kStages>;

// Values within bounds, like Prometheus's. One more counts what lies beyond the last bound.
class Histogram {
 public:
  explicit Histogram(std::vector<double> bounds) : bounds_(std::move(bounds)), counts_(bounds_.size() + 1) {}
  void observe(double value);
  std::vector<uint64_t> counts() const;
  double sum() const { return sum_.load(std::memory_order_relaxed); }

 private:
  const std::vector<double> bounds_;  // ascending; a value on a bound is within it
  std::vector<std::atomic<uint64_t>> counts_;
  std::atomic<double> sum_{0};
};

// A request that was not answered with sums, or one that was and that somebody wants to hear of.
struct Told {
  double time = 0;  // Unix time in seconds
  uint64_t request_id = 0;
  uint64_t layer = 0;
  uint64_t tokens = 0, pairs = 0;
  std::string caller, traceparent;
  Code code = Code::kOk;
  std::string text;  // why not
  Stages seconds{};  // of an answered one
};

// The latest of many records. Its lock is held for no more than one of them.
template <typename Record>
class Ring {
 public:
  explicit Ring(size_t size) : records_(size) {}

  void add(Record record) {
    const std::lock_guard lock(mutex_);
    std::swap(records_[added_++ % records_.size()], record);
  }

  // The oldest first.
  std::vector<Record> read() const {
    std::vector<Record> found;
    for (uint64_t next = 0;; ++next) {
      const std::lock_guard lock(mutex_);
      if (added_ > records_.size()) next = std::max(next, added_ - records_.size());
      if (next >= added_ || found.size() == records_.size()) return found;
      found.push_back(records_[next % records_.size()]);
    }
  }

 private:
  mutable std::mutex mutex_;
  std::vector<Record> records_;
  uint64_t added_ = 0;
};

// Counts what happens to the requests of an engine. Any thread may write and read at once; nobody waits for a reader
// for longer than it takes to copy a few words. A request is counted before its caller is told, so that who was
// answered finds it counted.
class Tally : public Owned {
 public:
  static constexpr size_t kCodes = 17;                      // gRPC's
  static constexpr size_t kTold = 4096;                     // kept until somebody takes them; further ones are dropped
  static constexpr size_t kAnswers = 1000, kRefusals = 20;  // the latest, remembered

  struct Answer {
    double time = 0;  // in seconds of the monotonic clock: their ages are asked for
    uint64_t tokens = 0;
    Stages seconds{};
  };

  // Counts requests for `layers`, ascending, and experts below `experts`; histograms have these bounds, and those of
  // computing and of the total `fine_bounds` if there are any.
  Tally(std::vector<uint32_t> layers, size_t experts, std::vector<double> second_bounds,
        std::vector<double> token_bounds, std::vector<double> fine_bounds = {});

  // A request waits.
  void began() { in_flight_.fetch_add(1, std::memory_order_relaxed); }
  // It is answered; completing the answer took `encode` seconds.
  void answered(const Job& job, double encode);
  // It is not.
  void refused(const Job& job, const Refusal& refusal);
  // Another identity's request took its room: no refusal that has to come at once.
  void evicted(const Job& job, const Refusal& refusal);
  // One that never waited.
  void turned_away(const Refusal& refusal, uint64_t request_id, uint64_t layer, std::string_view caller,
                   std::string_view identity, std::string_view traceparent, uint64_t arrived_ns);
  void started(const Batch& batch, uint64_t now_ns);
  void computed(const Batch& batch);

  // Which requests are told of: all, or those that are traced; none at first.
  void tell_of(bool all, bool traced);
  std::vector<Told> take_told(uint64_t* dropped);
  std::vector<Answer> answers() const { return answers_.read(); }
  std::vector<Told> refusals() const { return refusals_.read(); }

  const std::vector<uint32_t>& layers() const { return layers_; }
  int64_t in_flight() const { return in_flight_.load(std::memory_order_relaxed); }
  uint64_t outcomes(size_t code) const { return outcomes_[code].load(std::memory_order_relaxed); }
  uint64_t evictions() const { return evictions_.load(std::memory_order_relaxed); }
  uint64_t tokens() const { return tokens_.load(std::memory_order_relaxed); }
  uint64_t pairs() const { return pairs_.load(std::memory_order_relaxed); }
  double busy_seconds() const { return busy_.load(std::memory_order_relaxed); }
  const std::deque<Histogram>& stages() const { return stages_; }
  const Histogram& refusal_seconds() const { return refusal_seconds_; }
  // From arrival on, of requests that ended with this gRPC status, which is not OK.
  const Histogram& failure_seconds(size_t code) const { return failure_seconds_.at(code); }
  const Callers& callers() const { return callers_; }
  const Histogram& batch_tokens() const { return batch_tokens_; }
  // Of the layer at `index`: how many waited, and for how many seconds in all.
  std::pair<uint64_t, double> queue_wait(size_t index) const;
  // [layers, experts]
  std::vector<uint64_t> expert_pairs() const;

 private:
  struct Wait {
    std::atomic<uint64_t> count{0};
    std::atomic<double> seconds{0};
  };

  // Among `layers_`, which has it.
  size_t row_of(uint32_t layer) const;
  void end(const Job& job, const Refusal& refusal);
  void count_refusal(Told told, std::string_view identity, uint64_t arrived_ns);
  bool tells_of(const std::string& traceparent) const;
  void tell(Told told);

  const std::vector<uint32_t> layers_;
  const size_t experts_;
  std::atomic<int64_t> in_flight_{0};
  std::array<std::atomic<uint64_t>, kCodes> outcomes_{};
  std::atomic<uint64_t> tokens_{0}, pairs_{0}, evictions_{0};
  std::atomic<double> busy_{0};
  std::deque<Histogram> stages_;
  Histogram refusal_seconds_, batch_tokens_;
  std::deque<Histogram> failure_seconds_;  // [kCodes]
  Callers callers_;
  std::vector<Wait> waits_;
  std::vector<std::atomic<uint64_t>> expert_pairs_;
  Ring<Answer> answers_{kAnswers};
  Ring<Told> refusals_{kRefusals};

  std::atomic<bool> tell_all_{false}, tell_traced_{false};
  std::mutex telling_;  // of the two below
  std::deque<Told> told_;
  uint64_t dropped_ = 0;
};

}  // namespace expertd
