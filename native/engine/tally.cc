#include "engine/tally.h"

#include <time.h>

#include <algorithm>
#include <utility>

#include "base/clock.h"

namespace expertd {
namespace {

double unix_time() {
  timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

double seconds_since(uint64_t begin_ns) { return static_cast<double>(monotonic_ns() - begin_ns) * 1e-9; }

template <typename T>
void add(std::atomic<T>& counter, T amount) {
  counter.fetch_add(amount, std::memory_order_relaxed);
}

Told told_of(const Job& job) {
  return {.time = unix_time(),
          .request_id = job.request.request_id,
          .layer = job.request.layer,
          .tokens = job.tokens(),
          .caller = job.caller,
          .traceparent = job.traceparent,
          .text = {}};
}

}  // namespace

void Histogram::observe(double value) {
  const auto within = std::lower_bound(bounds_.begin(), bounds_.end(), value);
  add<uint64_t>(counts_[within - bounds_.begin()], 1);
  add(sum_, value);
}

std::vector<uint64_t> Histogram::counts() const {
  std::vector<uint64_t> counts;
  for (const auto& count : counts_) counts.push_back(count.load(std::memory_order_relaxed));
  return counts;
}

Tally::Tally(std::vector<uint32_t> layers, size_t experts, std::vector<double> second_bounds,
             std::vector<double> token_bounds, std::vector<double> fine_bounds)
    : layers_(std::move(layers)),
      experts_(experts),
      refusal_seconds_(second_bounds),
      batch_tokens_(std::move(token_bounds)),
      waits_(layers_.size()),
      expert_pairs_(layers_.size() * experts) {
  if (fine_bounds.empty()) fine_bounds = second_bounds;
  for (size_t stage = 0; stage < kStages; ++stage) {
    stages_.emplace_back(stage == kCompute || stage == kTotal ? fine_bounds : second_bounds);
  }
  for (size_t code = 0; code < kCodes; ++code) failure_seconds_.emplace_back(second_bounds);
}

size_t Tally::row_of(uint32_t layer) const {
  return static_cast<size_t>(std::lower_bound(layers_.begin(), layers_.end(), layer) - layers_.begin());
}

void Tally::answered(const Job& job, double encode) {
  const Admitted& request = job.request;
  const StageSeconds& spent = job.seconds;
  const Stages seconds{
      spent.decode, spent.queue, spent.copy_in, spent.compute, spent.copy_out, encode, seconds_since(job.arrived_ns)};
  add<int64_t>(in_flight_, -1);
  add<uint64_t>(outcomes_[static_cast<size_t>(Code::kOk)], 1);
  add<uint64_t>(tokens_, job.tokens());
  callers_.answered(job.identity, job.tokens());
  for (size_t stage = 0; stage < kStages; ++stage) stages_[stage].observe(seconds[stage]);
  const size_t row = experts_ * row_of(request.layer);
  uint64_t pairs = 0;
  for (size_t local = 0; local < request.pairs.size(); ++local) {
    if (request.pairs[local] == 0) continue;
    add<uint64_t>(expert_pairs_[row + request.owned->experts[local]], request.pairs[local]);
    pairs += request.pairs[local];
  }
  add(pairs_, pairs);
  answers_.add({static_cast<double>(monotonic_ns()) * 1e-9, job.tokens(), seconds});
  if (!tells_of(job.traceparent)) return;
  Told told = told_of(job);
  told.pairs = pairs;
  told.seconds = seconds;
  tell(std::move(told));
}

void Tally::refused(const Job& job, const Refusal& refusal) {
  if (refusal.code == Code::kResourceExhausted) refusal_seconds_.observe(seconds_since(job.arrived_ns));
  end(job, refusal);
}

void Tally::evicted(const Job& job, const Refusal& refusal) {
  add<uint64_t>(evictions_, 1);
  end(job, refusal);
}

void Tally::end(const Job& job, const Refusal& refusal) {
  add<int64_t>(in_flight_, -1);
  Told told = told_of(job);
  told.code = refusal.code;
  told.text = refusal.text;
  count_refusal(std::move(told), job.identity, job.arrived_ns);
}

void Tally::turned_away(const Refusal& refusal, uint64_t request_id, uint64_t layer, std::string_view caller,
                        std::string_view identity, std::string_view traceparent, uint64_t arrived_ns) {
  if (refusal.code == Code::kResourceExhausted) refusal_seconds_.observe(seconds_since(arrived_ns));
  count_refusal({.time = unix_time(),
                 .request_id = request_id,
                 .layer = layer,
                 .caller = std::string(caller),
                 .traceparent = std::string(traceparent),
                 .code = refusal.code,
                 .text = refusal.text},
                identity, arrived_ns);
}

void Tally::count_refusal(Told told, std::string_view identity, uint64_t arrived_ns) {
  const auto code = static_cast<size_t>(told.code);
  add<uint64_t>(outcomes_[code], 1);
  failure_seconds_[code].observe(seconds_since(arrived_ns));
  if (told.code == Code::kCancelled) {
    told.text = "the caller gave up";
  } else {
    callers_.refused(identity);
  }
  refusals_.add(told);
  if (tells_of(told.traceparent)) tell(std::move(told));
}

void Tally::tell_of(bool all, bool traced) {
  tell_all_.store(all, std::memory_order_relaxed);
  tell_traced_.store(traced, std::memory_order_relaxed);
}

bool Tally::tells_of(const std::string& traceparent) const {
  return tell_all_.load(std::memory_order_relaxed) ||
         (!traceparent.empty() && tell_traced_.load(std::memory_order_relaxed));
}

void Tally::tell(Told told) {
  const std::lock_guard lock(telling_);
  if (told_.size() < kTold) {
    told_.push_back(std::move(told));
  } else {
    ++dropped_;
  }
}

void Tally::started(const Batch& batch, uint64_t now_ns) {
  const Admitted& first = batch.first();
  Wait& wait = waits_[row_of(first.layer)];
  for (const auto& job : batch.jobs) {
    add<uint64_t>(wait.count, 1);
    add(wait.seconds, static_cast<double>(now_ns - std::min(now_ns, job->admitted_ns)) * 1e-9);
  }
}

void Tally::computed(const Batch& batch) {
  batch_tokens_.observe(static_cast<double>(batch.tokens));
  add(busy_, batch.seconds.compute);
}

std::vector<Told> Tally::take_told(uint64_t* dropped) {
  std::deque<Told> taken;
  {
    const std::lock_guard lock(telling_);
    taken.swap(told_);
    *dropped = std::exchange(dropped_, 0);
  }
  return {std::make_move_iterator(taken.begin()), std::make_move_iterator(taken.end())};
}

std::pair<uint64_t, double> Tally::queue_wait(size_t index) const {
  const Wait& wait = waits_.at(index);
  return {wait.count.load(std::memory_order_relaxed), wait.seconds.load(std::memory_order_relaxed)};
}

std::vector<uint64_t> Tally::expert_pairs() const {
  std::vector<uint64_t> pairs;
  pairs.reserve(expert_pairs_.size());
  for (const auto& count : expert_pairs_) pairs.push_back(count.load(std::memory_order_relaxed));
  return pairs;
}

}  // namespace expertd
