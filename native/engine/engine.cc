#include "engine/engine.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <utility>

namespace expertd {
namespace {

// Of a message beside its tensors: it is kept as long as its request, and admission counts tensors alone.
constexpr size_t kMostBeside = 64 << 10;
// For a thread to come to its end.
constexpr std::chrono::seconds kPatience{1};

}  // namespace

Engine::Engine(PlacementPtr placement, uint64_t batch_tokens, Amount most_waiting, std::shared_ptr<Tally> tally,
               int64_t spin_ns)
    : batch_tokens_(batch_tokens),
      tally_(std::move(tally)),
      admission_(most_waiting),
      closed_because_("the server is starting"),
      placement_(std::move(placement)),
      lanes_(*this),
      spin_(SpinHost::here(), spin_ns) {
  fault_bell_.arm();
}

Engine::~Engine() {
  stop();
  if (executor_) executor_->on_done(nullptr);
  if (failpoints_) failpoints_->release_due(UINT64_MAX);
  // A waiting job keeps itself; what is left of them belongs to their inboxes alone.
  for (auto& batch : stranded_) batch.release();
  for (FairQueue* queue : {&queue_, &small_})
    for (Job* job : queue->take_all()) const std::shared_ptr<Job> last = std::move(job->self);
}

void Engine::use(std::shared_ptr<Executor> executor) {
  executor_ = std::move(executor);
  executor_->on_done([this] { wake(); });
}

void Engine::start() {
  running_ = true;
  thread_ = std::thread([this] { run(); });
  pthread_setname_np(thread_.native_handle(), "expertd-engine");
}

bool Engine::stop() {
  stopping_.store(true);
  bell_.ring();
  {
    std::unique_lock lock(handing_);
    lost_ = lost_ || !handed_in_.wait_for(lock, kPatience, [this] { return !running_ && handed_out_ == 0; });
  }
  if (thread_.joinable()) lost_ ? thread_.detach() : thread_.join();
  turns_ += 2;
  turns_.notify_all();
  return !lost_;
}

void Engine::await_turn() {
  // The turn that goes on now may have begun before.
  for (uint64_t seen = turns_, last = seen + 2; seen < last; seen = turns_) {
    asked_.store(true);
    bell_.ring();
    turns_.wait(seen);
  }
  if (failpoints_) failpoints_->check_device();
}

std::optional<std::string> Engine::take_fault() {
  fault_bell_.disarm();
  fault_bell_.arm();
  const std::lock_guard lock(mutex_);
  return std::exchange(fault_, std::nullopt);
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
  const auto is_over = [](const auto& earlier) { return earlier.expired(); };
  earlier_.erase(std::remove_if(earlier_.begin(), earlier_.end(), is_over), earlier_.end());
  if (placement_->beside) earlier_.push_back(placement_->beside);
  earlier_.push_back(std::exchange(placement_, std::move(placement)));
}

bool Engine::uses_before(uint64_t epoch) const {
  const std::lock_guard lock(mutex_);
  return std::any_of(earlier_.begin(), earlier_.end(), [&](const auto& earlier) {
    const PlacementPtr used = earlier.lock();
    return used && used->epoch < epoch && is_used(used);
  });
}

bool Engine::is_used(const PlacementPtr& earlier) const {
  const auto kept = kept_.find(earlier.get());
  // The one here, those of stranded jobs, which never go, and the placement that it is beside, which counts by itself.
  long others = 1 + (kept == kept_.end() ? 0 : kept->second);
  for (const auto& one : earlier_) {
    const PlacementPtr other = one.lock();
    others += other && other->beside == earlier;
  }
  return earlier.use_count() > others;
}

void Engine::begin_placement() {
  Placement next = *placement();
  ++next.epoch;
  if (next.beside) {
    Placement beside = *next.beside;
    beside.epoch = next.epoch;
    next.beside = std::make_shared<const Placement>(std::move(beside));
  }
  set_placement(std::make_shared<const Placement>(std::move(next)));
}

std::optional<Refusal> Engine::check_open() const {
  const std::lock_guard lock(mutex_);
  if (!refusing_ || !closed_because_) return std::nullopt;
  return Refusal{Code::kUnavailable, *closed_because_};
}

std::optional<Refusal> Engine::check_room(const std::string& identity, Amount more) const {
  if (auto refusal = check_open()) return refusal;
  return admission_.check(identity, more);
}

std::optional<Refusal> Engine::check_head(const Message& message, Job* job) {
  if (failpoints_ && !message.cancels && failpoints_->strikes("stale_epoch")) begin_placement();
  PlacementPtr placement = generation_of(this->placement(), message.model_fingerprint);
  // Before anything is read of the tensors: a server with too much to do has no time for what it will refuse.
  const uint64_t tokens = std::min<uint64_t>(message.num_tokens, placement->max_tokens);
  if (auto refusal = check_room(job->identity, {tokens, message.num_tensor_bytes()})) return refusal;
  auto sizes = check_sizes(message, std::move(placement));
  if (auto* refusal = std::get_if<Refusal>(&sizes)) return std::move(*refusal);
  job->request = std::move(std::get<Admitted>(sizes));
  return std::nullopt;
}

std::optional<Refusal> Engine::check(const Message& message, Job* job) {
  if (auto refusal = check_head(message, job)) return refusal;
  const std::pair<const char*, std::optional<uint64_t>> offsets[] = {{"segment_offset", message.segment_offset},
                                                                     {"gpu_offset", message.gpu_offset},
                                                                     {"sums_offset", message.sums_offset}};
  for (const auto& [field, offset] : offsets) {
    if (!offset) continue;
    return Refusal{Code::kInvalidArgument,
                   std::string(field) + " is " + std::to_string(*offset) + "; there is no segment: send the tensors"};
  }
  const Tensors tensors{message.hidden, message.hidden_scales, message.expert_ids, message.weights};
  if (auto refusal = check_tensors(message, tensors, job)) return refusal;
  const size_t beside = message.num_bytes - message.num_tensor_bytes();
  if (beside <= kMostBeside) return std::nullopt;
  return Refusal{Code::kInvalidArgument, "the message has " + std::to_string(beside) +
                                             " bytes beside its tensors; at most " + std::to_string(kMostBeside) +
                                             " are taken"};
}

std::optional<Refusal> Engine::place(const Message& message, const Lane& lane, LaneJob* job) {
  if (auto refusal = check_head(message, job)) return refusal;
  Placed placed;
  if (auto refusal = expertd::place(message, job->request, lane.segment, &job->copied, &placed)) return refusal;
  job->reply = placed.sums;
  job->tensors = placed.tensors;
  job->reach = placed.tensors.on_device ? lane.gpu_reach : lane.reach;
  return std::nullopt;
}

std::optional<Refusal> Engine::check_tensors(const Message& message, const Tensors& tensors, Job* job) {
  if (failpoints_) failpoints_->alter(tensors);
  return expertd::check_tensors(message, tensors, &job->request);
}

uint32_t Engine::min_reply_room() const { return 1024 + 8 * placement()->num_routed_experts; }

std::optional<Refusal> Engine::submit(std::shared_ptr<Job> job) {
  if (auto refusal = check_open()) return refusal;
  job->admitted_ns = monotonic_ns();
  if (job->request.timeout_us != 0) {
    const uint64_t longest_us = (UINT64_MAX - job->admitted_ns) / 1000;
    const uint64_t expires = job->admitted_ns + std::min(job->request.timeout_us, longest_us) * 1000;
    job->expires_ns = job->expires_ns == 0 ? expires : std::min(job->expires_ns, expires);
  }
  std::vector<Evicted> evicted;
  if (auto refusal = admission_.admit(job, &evicted)) return refusal;
  tally_->began();
  for (Evicted& one : evicted) evicted_.add(std::move(one));
  submitted_.add(std::move(job));
  bell_.ring();
  return std::nullopt;
}

void Engine::cancel(std::shared_ptr<Job> job) {
  cancels_.add(std::move(job));
  bell_.ring();
}

size_t Engine::handed_out() const {
  const std::lock_guard lock(handing_);
  return handed_out_;
}

}  // namespace expertd
