#include "engine/engine.h"

#include <poll.h>
#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <utility>

namespace expertd {
namespace {

// A batch smaller than this gains more by growing while another is under way than by overlapping with it.
constexpr uint64_t kOverlapTokens = 256;
// Seconds; a server that is this far behind is better judged again then than trusted with a longer estimate.
constexpr double kLongestDelay = 5.0, kShortestDelay = 0.001;
// Of the newest batch in the moving average of the device's rate.
constexpr double kNewestShare = 0.1;

Refusal deadline_exceeded(const Job& job, uint64_t now) {
  char text[64];
  std::snprintf(text, sizeof text, "timeout_us ran out after %.6f s in the queue",
                static_cast<double>(now - job.admitted_ns) * 1e-9);
  return {Code::kDeadlineExceeded, text};
}

Refusal cancelled(const Job& job) {
  return {Code::kCancelled, "request " + std::to_string(job.request.request_id) + " was cancelled by its caller"};
}

}  // namespace

uint64_t monotonic_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(now.tv_nsec);
}

bool may_start(const std::vector<uint64_t>& under_way, uint64_t waiting, size_t depth) {
  if (under_way.empty()) return true;
  const uint64_t smallest = *std::min_element(under_way.begin(), under_way.end());
  return under_way.size() < depth && (smallest >= kOverlapTokens || waiting >= kOverlapTokens);
}

Engine::Engine(PlacementPtr placement, Bounds bounds, std::unique_ptr<Executor> executor)
    : bounds_(bounds),
      executor_(std::move(executor)),
      closed_because_("the server is starting"),
      placement_(std::move(placement)) {}

Engine::~Engine() {
  stop();
  // A waiting job keeps itself; what is left of them belongs to their inboxes alone.
  for (Job* job : queue_.take_all()) const std::shared_ptr<Job> last = std::move(job->self);
}

void Engine::start() {
  thread_ = std::thread([this] { run(); });
  pthread_setname_np(thread_.native_handle(), "expertd-engine");
}

void Engine::stop() {
  stopping_.store(true);
  bell_.ring();
  if (thread_.joinable()) thread_.join();
}

void Engine::open() {
  const std::lock_guard lock(mutex_);
  closed_because_.reset();
  refusing_ = false;
}

void Engine::close(std::string reason, bool refusing) {
  const std::lock_guard lock(mutex_);
  closed_because_ = std::move(reason);
  refusing_ = refusing_ || refusing;
}

void Engine::abandon(std::string reason) {
  close(std::move(reason), /*refusing=*/true);
  abandoned_.store(true);
  bell_.ring();
}

std::optional<std::string> Engine::closed_because() const {
  const std::lock_guard lock(mutex_);
  return closed_because_;
}

PlacementPtr Engine::placement() const {
  const std::lock_guard lock(mutex_);
  return placement_;
}

void Engine::set_placement(PlacementPtr placement) {
  const std::lock_guard lock(mutex_);
  placement_ = std::move(placement);
}

std::optional<Refusal> Engine::check_room(uint64_t tokens, uint64_t bytes) const {
  {
    const std::lock_guard lock(mutex_);
    if (refusing_ && closed_because_) return Refusal{Code::kUnavailable, *closed_because_};
  }
  const uint64_t waiting_tokens = queued_tokens(), waiting_bytes = queued_bytes();
  if (waiting_tokens + tokens > bounds_.queued_tokens) {
    return overloaded(std::to_string(waiting_tokens) + " tokens are queued and num_tokens is " +
                          std::to_string(tokens) + "; at most " + std::to_string(bounds_.queued_tokens) + " may wait",
                      tokens, bounds_.queued_tokens);
  }
  if (waiting_bytes + bytes > bounds_.queued_bytes) {
    return overloaded(std::to_string(waiting_bytes) + " bytes are queued and the request's tensors have " +
                          std::to_string(bytes) + "; at most " + std::to_string(bounds_.queued_bytes) + " may wait",
                      tokens, waiting_tokens);
  }
  return std::nullopt;
}

// `tokens` fit into `room` once half of the queue is gone: a full queue soon fills up again.
Refusal Engine::overloaded(std::string text, uint64_t tokens, uint64_t room) const {
  Refusal refusal{Code::kResourceExhausted, std::move(text) + ": retry later or use another replica"};
  const double rate = tokens_per_second_.load(std::memory_order_relaxed);
  if (rate > 0) {
    const double queued = static_cast<double>(queued_tokens());
    const double ahead =
        std::max(queued + static_cast<double>(tokens) - static_cast<double>(room), std::floor(queued / 2));
    refusal.retry_after = std::clamp(ahead / rate, kShortestDelay, kLongestDelay);
  }
  return refusal;
}

std::optional<Refusal> Engine::check(const Message& message, Job* job) const {
  PlacementPtr placement = this->placement();
  // Before anything is read of the tensors: a server with too much to do has no time for what it will refuse.
  const uint64_t tokens = std::min<uint64_t>(message.num_tokens, placement->max_tokens);
  if (auto refusal = check_room(tokens, message.num_tensor_bytes())) return refusal;
  auto sizes = check_sizes(message, std::move(placement));
  if (auto* refusal = std::get_if<Refusal>(&sizes)) return std::move(*refusal);
  job->request = std::move(std::get<Admitted>(sizes));
  if (message.segment_offset || message.gpu_offset) {
    const bool host = message.segment_offset.has_value();
    return Refusal{Code::kInvalidArgument, std::string(host ? "segment_offset" : "gpu_offset") + " is " +
                                               std::to_string(host ? *message.segment_offset : *message.gpu_offset) +
                                               "; there is no segment: send the tensors"};
  }
  const Tensors tensors{message.hidden, message.hidden_scales, message.expert_ids, message.weights};
  return check_tensors(message, tensors, &job->request);
}

std::optional<Refusal> Engine::submit(std::shared_ptr<Job> job) {
  if (auto refusal = check_room(job->tokens(), job->num_bytes())) return refusal;
  job->admitted_ns = monotonic_ns();
  if (job->request.timeout_us != 0) {
    const uint64_t expires = job->admitted_ns + job->request.timeout_us * 1000;
    job->expires_ns = job->expires_ns == 0 ? expires : std::min(job->expires_ns, expires);
  }
  queued_tokens_ += job->tokens();
  queued_bytes_ += job->num_bytes();
  submitted_.add(std::move(job));
  bell_.ring();
  return std::nullopt;
}

void Engine::cancel(std::shared_ptr<Job> job) {
  cancels_.add(std::move(job));
  bell_.ring();
}

bool Engine::turn(uint64_t now) {
  bool worked = false;
  while (auto batch = executor_->poll()) {
    finish(std::move(batch), now);
    worked = true;
  }
  worked |= take_submissions();
  worked |= take_cancels();
  if (abandoned_.exchange(false)) {
    give_up();
    worked = true;
  }
  while (!queue_.empty()) {
    std::vector<uint64_t> tokens;
    for (const Batch* batch : under_way_) tokens.push_back(batch->tokens);
    if (!may_start(tokens, queue_.tokens(), executor_->depth())) break;
    begin(now);
    worked = true;
  }
  return worked;
}

bool Engine::take_submissions() {
  const auto jobs = submitted_.take();
  for (const auto& job : jobs) {
    if (job->cancelled) {
      refuse(job, cancelled(*job));
      release_room(*job);
      continue;
    }
    job->self = job;
    queue_.put(job.get());
  }
  return !jobs.empty();
}

bool Engine::take_cancels() {
  const auto jobs = cancels_.take();
  for (const auto& job : jobs) {
    // Not waiting: with the device, over, or behind this look in the list of submissions.
    if (!queue_.remove(job.get())) {
      job->cancelled = true;
      continue;
    }
    release_room(*job);
    job->self.reset();
    refuse(job, cancelled(*job));
  }
  return !jobs.empty();
}

void Engine::begin(uint64_t now) {
  auto batch = std::make_unique<Batch>();
  for (Job* job : queue_.take(bounds_.batch_tokens)) {
    release_room(*job);
    std::shared_ptr<Job> owner = std::move(job->self);
    if (job->expires_ns != 0 && job->expires_ns <= now) {
      refuse(std::move(owner), deadline_exceeded(*job, now));
      continue;
    }
    batch->tokens += job->tokens();
    batch->jobs.push_back(std::move(owner));
  }
  if (batch->jobs.empty()) return;
  batch->started_ns = now;
  batch->alone = batch->tokens < kOverlapTokens && under_way_.empty() && queue_.empty();
  under_way_.push_back(batch.get());
  executor_->start(std::move(batch));
}

void Engine::finish(std::unique_ptr<Batch> batch, uint64_t now) {
  std::erase(under_way_, batch.get());
  if (!batch->failure) {
    const double seconds = std::max(static_cast<double>(now - batch->started_ns) * 1e-9, 1e-6);
    const double rate = static_cast<double>(batch->tokens) / seconds, known = tokens_per_second_;
    tokens_per_second_ = known + (rate - known) * (known > 0 ? kNewestShare : 1.0);
  }
  for (const auto& job : batch->jobs) {
    Inbox::Answer answer{.ticket = job->ticket, .refusal = batch->failure, .told = !job->answered, .over = true};
    if (job->cancelled) answer.refusal = cancelled(*job);
    job->inbox->push(std::move(answer));
  }
}

void Engine::give_up() {
  const Refusal unavailable{Code::kUnavailable, closed_because().value_or("the server gave up")};
  for (Job* job : queue_.take_all()) {
    release_room(*job);
    refuse(std::move(job->self), unavailable);
  }
  for (Batch* batch : under_way_) {
    for (const auto& job : batch->jobs) {
      if (std::exchange(job->answered, true)) continue;
      job->inbox->push({.ticket = job->ticket, .refusal = unavailable, .told = true, .over = false});
    }
  }
}

void Engine::refuse(std::shared_ptr<Job> job, Refusal refusal) {
  job->inbox->push({.ticket = job->ticket, .refusal = std::move(refusal), .told = true, .over = true});
}

void Engine::release_room(const Job& job) {
  queued_tokens_ -= job.tokens();
  queued_bytes_ -= job.num_bytes();
}

void Engine::run() {
  while (!stopping_.load()) {
    if (turn(monotonic_ns())) continue;
    bell_.arm();
    if (!turn(monotonic_ns()) && !stopping_.load()) {
      pollfd waiting{.fd = bell_.fd(), .events = POLLIN, .revents = 0};
      poll(&waiting, 1, -1);
    }
    bell_.disarm();
  }
}

}  // namespace expertd
