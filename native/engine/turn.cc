// What the engine's thread does.
#include <sys/prctl.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "base/pool.h"
#include "engine/engine.h"

namespace expertd {
namespace {

// More zeros than this are written by a thread of the pool.
constexpr uint64_t kLongZeros = 256 * 1024;
// Between two looks for callers that left, and the shortest sleep of who waits for a device that rings no bell.
constexpr uint64_t kLookNs = 1'000'000;
constexpr int64_t kLeastSleepNs = 50'000;
// A batch is looked for all the time from so long before it is due, which is as long as waking takes, to so long after.
constexpr uint64_t kSoonNs = 150'000, kLateNs = 150'000;

Refusal deadline_exceeded(const Job& job, uint64_t now) {
  char text[64];
  std::snprintf(text, sizeof text, "timeout_us ran out after %.6f s in the queue",
                // It may have come after the look at the clock.
                static_cast<double>(now - std::min(now, job.admitted_ns)) * 1e-9);
  return {Code::kDeadlineExceeded, text};
}

Refusal cancelled(const Job& job) {
  return {Code::kCancelled, "request " + std::to_string(job.request.request_id) + " was cancelled by its caller"};
}

double seconds_between(uint64_t begin, uint64_t end) { return static_cast<double>(end - begin) * 1e-9; }

std::string list_of(const std::vector<uint32_t>& values) {
  std::string text;
  for (const uint32_t value : values) text += (text.empty() ? "[" : ", ") + std::to_string(value);
  return text + "]";
}

// What is wrong with the pairs that the device counted.
std::optional<Refusal> miscounted(const Batch& batch) {
  std::vector<uint32_t> expected(batch.first().pairs.size());
  for (const auto& job : batch.jobs) {
    for (size_t expert = 0; expert < expected.size(); ++expert) expected[expert] += job->request.pairs[expert];
  }
  // A device may have room for more experts than a layer has.
  expected.resize(std::max(expected.size(), batch.pairs.size()));
  if (expected == batch.pairs) return std::nullopt;
  return Refusal{Code::kInternal, "layer " + std::to_string(batch.first().layer) + ": the device computed pairs " +
                                      list_of(batch.pairs) + ", not " + list_of(expected)};
}

// Whether its sums are zeros, in memory that can be written here.
bool wants_nothing(const std::shared_ptr<Job>& job) {
  const auto& pairs = job->request.pairs;
  return !is_on_device(job->reach) && std::all_of(pairs.begin(), pairs.end(), [](uint32_t n) { return n == 0; });
}

void make_room(const Batch& batch) {
  for (const auto& job : batch.jobs) {
    job->make_room();
    if (batch.for_nothing && job->sums != nullptr) std::memset(job->sums, 0, job->request.computed_bytes());
  }
}

bool takes_long_to_make_room(const Batch& batch) {
  uint64_t zeros = 0;
  for (const auto& job : batch.jobs) {
    if (job->is_slow()) return true;
    if (batch.for_nothing) zeros += job->request.computed_bytes();
  }
  return zeros > kLongZeros;
}

}  // namespace

bool may_start(const std::vector<uint64_t>& under_way, uint64_t waiting, size_t depth) {
  if (under_way.empty()) return true;
  const uint64_t smallest = *std::min_element(under_way.begin(), under_way.end());
  return under_way.size() < depth && (smallest >= kSmallTokens || waiting >= kSmallTokens);
}

Next next_batch(const std::vector<uint64_t>& under_way, bool express_is_free, uint64_t large, uint64_t small,
                size_t depth) {
  const bool place = under_way.size() < depth, many = small >= kSmallTokens;
  if (small > 0 && express_is_free && !(many && place)) return Next::kExpress;
  if (large > 0 && may_start(under_way, large, depth)) return Next::kLarge;
  return many && place ? Next::kSmall : Next::kNothing;
}

bool Engine::turn(uint64_t now) {
  bool worked = asked_.load() && asked_.exchange(false);
  while (auto batch = executor_->poll(now)) {
    if (failpoints_) failpoints_->after();
    finish(std::move(batch), now);
    worked = true;
  }
  const auto has_room = [](const auto& batch) { return batch->has_room.load(); };
  for (auto next = starting_.begin(); (next = std::find_if(next, starting_.end(), has_room)) != starting_.end();) {
    auto batch = std::move(*next);
    next = starting_.erase(next);
    start(std::move(batch), now);
    worked = true;
  }
  if (failpoints_) {
    for (auto& job : failpoints_->release_due(now)) {
      complete(std::move(job));
      worked = true;
    }
  }
  worked |= lanes_.turn();
  worked |= take_submissions();
  worked |= take_cancels();
  worked |= take_evicted();
  if (abandoned_.exchange(false)) {
    give_up();
    worked = true;
  }
  for (Next what; (what = next()) != Next::kNothing; worked = true) begin(what, now);
  return worked;
}

FairQueue& Engine::queue_of(const Job& job) {
  return executor_->has_express() && job.tokens() < kSmallTokens ? small_ : queue_;
}

Next Engine::next() const {
  if (queue_.empty() && small_.empty()) return Next::kNothing;
  std::vector<uint64_t> tokens;
  bool express_is_free = executor_->has_express();
  for (const Batch* batch : under_way_) {
    if (batch->express) {
      express_is_free = false;
    } else {
      tokens.push_back(batch->tokens);
    }
  }
  return next_batch(tokens, express_is_free, queue_.tokens(), small_.tokens(), executor_->depth());
}

bool Engine::take_submissions() {
  const auto jobs = submitted_.take();
  for (const auto& job : jobs) {
    if (job->evicted) continue;
    if (job->cancelled) {
      if (admission_.release(*job)) refuse(*job, cancelled(*job));
      continue;
    }
    job->self = job;
    queue_of(*job).put(job.get());
  }
  return !jobs.empty();
}

bool Engine::take_cancels() {
  const auto jobs = cancels_.take();
  for (const auto& job : jobs) {
    if (queue_of(*job).remove(job.get())) {
      job->self.reset();
      if (admission_.release(*job)) refuse(*job, cancelled(*job));
    } else if (failpoints_ && failpoints_->release(job.get())) {
      refuse(*job, cancelled(*job));
    } else {
      // With the device, over, or behind this look in the list of submissions.
      job->cancelled = true;
    }
  }
  return !jobs.empty();
}

// Whoever else finds that a job has no room any more leaves its answer to this.
bool Engine::take_evicted() {
  auto evicted = evicted_.take();
  for (auto& [job, refusal] : evicted) {
    job->evicted = true;
    if (queue_of(*job).remove(job.get())) job->self.reset();
    tally_->evicted(*job, refusal);
    job->settle({.refusal = std::move(refusal)});
  }
  return !evicted.empty();
}

void Engine::begin(Next what, uint64_t now) {
  auto batch = std::make_unique<Batch>();
  batch->express = what == Next::kExpress;
  FairQueue& queue = what == Next::kLarge ? queue_ : small_;
  for (Job* job : queue.take(batch->express ? std::min<uint64_t>(batch_tokens_, kSmallTokens - 1) : batch_tokens_)) {
    std::shared_ptr<Job> owner = std::move(job->self);
    if (!admission_.release(*job)) continue;
    if (job->expires_ns != 0 && job->expires_ns <= now) {
      refuse(*job, deadline_exceeded(*job, now));
      continue;
    }
    batch->tokens += job->tokens();
    batch->jobs.push_back(std::move(owner));
  }
  if (batch->jobs.empty()) return;
  batch->started_ns = now;
  // Not at `now`: some came after it.
  tally_->started(*batch, monotonic_ns());
  batch->alone = batch->tokens < kSmallTokens && idle();
  batch->for_nothing = std::all_of(batch->jobs.begin(), batch->jobs.end(), wants_nothing);
  under_way_.push_back(batch.get());
  if (!takes_long_to_make_room(*batch)) {
    make_room(*batch);
    return start(std::move(batch), now);
  }
  hand_out([this, waiting = batch.get()] {
    make_room(*waiting);
    waiting->has_room = true;
    bell_.ring();
  });
  starting_.push_back(std::move(batch));
}

void Engine::start(std::unique_ptr<Batch> batch, uint64_t now) {
  std::erase_if(batch->jobs, [&](const std::shared_ptr<Job>& job) {
    if (job->sums != nullptr) return false;
    refuse(*job, {Code::kResourceExhausted, "the server has no memory for the answer: retry later"});
    batch->tokens -= job->tokens();
    return true;
  });
  if (batch->jobs.empty()) {
    std::erase(under_way_, batch.get());
    return;
  }
  if (failpoints_) failpoints_->before(batch.get());
  if (batch->failure || batch->for_nothing) {
    finish(std::move(batch), monotonic_ns());  // some came after `now`
  } else {
    executor_->start(std::move(batch), now);
  }
}

void Engine::finish(std::unique_ptr<Batch> batch, uint64_t now) {
  std::erase(under_way_, batch.get());
  if (batch->device_failed) tell_fault(batch->failure ? batch->failure->text : batch->fault);
  if (batch->stranded) return strand(std::move(batch));
  if (!batch->failure && !batch->for_nothing) {
    admission_.computed(batch->tokens, seconds_between(batch->started_ns, now), batch->express);
    batch->failure = miscounted(*batch);
    if (!batch->failure) tally_->computed(*batch);
  }
  const DeviceSeconds& device = batch->seconds;
  const bool alone = batch->jobs.size() == 1 && idle();
  for (const auto& job : batch->jobs) {
    job->alone = alone;
    job->seconds = {.decode = seconds_between(job->arrived_ns, job->admitted_ns),
                    .queue = seconds_between(job->admitted_ns, now) - device.copy_in - device.compute - device.copy_out,
                    .copy_in = device.copy_in,
                    .compute = device.compute,
                    .copy_out = device.copy_out};
    auto refusal = job->cancelled ? std::optional(cancelled(*job)) : batch->failure;
    if (job->answered) {
      job->settle({.refusal = std::move(refusal), .told = false});
    } else if (refusal) {
      refuse(*job, *std::move(refusal));
    } else {
      if (sampler_) sampler_->offer(*job);
      if (!failpoints_ || !failpoints_->withhold(job, now)) complete(job);
    }
  }
}

void Engine::tell_fault(std::string fault) {
  {
    const std::lock_guard lock(mutex_);
    fault_ = std::move(fault);
  }
  fault_bell_.ring();
}

void Engine::strand(std::unique_ptr<Batch> batch) {
  {
    const std::lock_guard lock(mutex_);
    for (const auto& job : batch->jobs) ++kept_[job->request.placement.get()];
  }
  for (const auto& job : batch->jobs)
    if (!std::exchange(job->answered, true)) refuse(*job, *batch->failure, /*over=*/false);
  stranded_.push_back(std::move(batch));
}

void Engine::complete(std::shared_ptr<Job> job) {
  if (!job->is_slow_to_complete()) return answer(*job);
  hand_out([this, job = std::move(job)] { answer(*job); });
}

void Engine::answer(Job& job) {
  const uint64_t begin = monotonic_ns();
  job.round();
  job.complete();
  if (failpoints_) failpoints_->alter(&job);
  tally_->answered(job, seconds_between(begin, monotonic_ns()));
  job.settle({});
}

void Engine::hand_out(std::function<void()> work) {
  {
    const std::lock_guard lock(handing_);
    if (lost_) return;
    ++handed_out_;
  }
  Pool::of_process().post([this, work = std::move(work)]() mutable {
    std::exchange(work, nullptr)();
    // Within the lock: who waits for it may end the engine.
    const std::lock_guard lock(handing_);
    if (--handed_out_ == 0) handed_in_.notify_all();
  });
}

void Engine::give_up() {
  const Refusal unavailable{Code::kUnavailable, closed_because().value_or("the server gave up")};
  for (FairQueue* queue : {&queue_, &small_}) {
    for (Job* job : queue->take_all()) {
      const std::shared_ptr<Job> owner = std::move(job->self);
      if (admission_.release(*job)) refuse(*job, unavailable);
    }
  }
  if (failpoints_) {
    for (const auto& job : failpoints_->release_due(UINT64_MAX)) refuse(*job, unavailable);
  }
  for (Batch* batch : under_way_) {
    for (const auto& job : batch->jobs) {
      if (std::exchange(job->answered, true)) continue;
      refuse(*job, unavailable, /*over=*/false);
    }
  }
}

void Engine::refuse(Job& job, Refusal refusal, bool over) {
  tally_->refused(job, refusal);
  job.settle({.refusal = std::move(refusal), .told = true, .over = over});
}

void Engine::run() {
  prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);  // a batch that is due in 50 us would be seen after 100
  while (!stopping_.load()) {
    const uint64_t now = monotonic_ns();
    if (turn(now)) {
      spin_.found(static_cast<int64_t>(now));
    } else if (spins(now)) {
      pause_cpu();
    } else {
      sleep(now);
    }
    if (now - looked_ns_ > kLookNs) {
      // Who has left is seen even by a thread that never sleeps.
      looked_ns_ = now;
      lanes_.sleep(0);
    }
    ++turns_;
    turns_.notify_all();
  }
  // Within the lock: who waits for it may end the engine.
  const std::lock_guard lock(handing_);
  running_ = false;
  handed_in_.notify_all();
}

bool Engine::spins(uint64_t now) {
  if (spin_.goes_on(static_cast<int64_t>(now), !under_way_.empty())) return true;
  const uint64_t due = executor_->due_ns();
  if (now + kSoonNs < due || now >= due + kLateNs) return false;
  return spin_.goes_on_until(static_cast<int64_t>(now), static_cast<int64_t>(due + kLateNs));
}

void Engine::sleep(uint64_t now) {
  bell_.arm();
  const bool quiet = lanes_.arm();
  if (turn(now)) {
    spin_.found(static_cast<int64_t>(now));
  } else if (quiet && !stopping_.load()) {
    uint64_t due = executor_->due_ns();
    if (failpoints_) due = failpoints_->sooner(due);
    const int64_t left = static_cast<int64_t>(due) - static_cast<int64_t>(now + kSoonNs);
    lanes_.sleep(due == 0 ? -1 : std::max(left, kLeastSleepNs));
  }
  lanes_.disarm();
  bell_.disarm();
}

}  // namespace expertd
