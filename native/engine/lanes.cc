#include "engine/lanes.h"

#include <poll.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>
#include <utility>
#include <variant>

#include "engine/engine.h"
#include "tokens/rows.h"

namespace expertd {
namespace {

constexpr int kEvents = 64;
// More bytes than this are summed by a thread of the pool: so many take this one some 0.1 ms.
constexpr size_t kLongSum = 1 << 20;
// Between two looks at what GPUs post, which ring no bells.
constexpr int64_t kLookNs = 1'000'000;

void cut(Lane& lane) {
  lane.cut.store(true);
  lane.ring->shut_down();
}

}  // namespace

Lanes::Lanes(Engine& engine) : engine_(engine), epoll_(epoll_create1(EPOLL_CLOEXEC)) {
  if (epoll_ < 0) throw std::system_error(errno, std::generic_category(), "epoll_create1");
  watch(engine.bell_.fd(), nullptr);
  over_bell_.arm();
}

Lanes::~Lanes() {
  disconnect();
  // Lanes and jobs that nobody answers any more keep each other.
  for (const auto& lane : lanes_) const auto last = std::exchange(lane->jobs, {});
  ::close(epoll_);
}

void Lanes::watch(int descriptor, void* lane) {
  epoll_event event{};
  event.events = EPOLLIN | EPOLLRDHUP;
  event.data.ptr = lane;
  if (epoll_ctl(epoll_, EPOLL_CTL_ADD, descriptor, &event) != 0) {
    throw std::system_error(errno, std::generic_category(), "epoll_ctl");
  }
}

uint64_t Lanes::add(std::shared_ptr<Lane> lane) {
  const uint64_t number = lane->number = ++last_number_;
  watch(lane->ring->socket(), lane.get());
  {
    const std::lock_guard lock(mutex_);
    added_.push_back(std::move(lane));
    has_added_.store(true);
  }
  engine_.wake();
  return number;
}

void Lanes::disconnect() {
  const std::lock_guard lock(mutex_);
  for (const auto* lanes : {&lanes_, &added_}) {
    for (const auto& lane : *lanes) cut(*lane);
  }
}

void Lanes::close() {
  // What another thread held at the fork stays open.
  if (!mutex_.try_lock()) return;
  for (const auto* lanes : {&lanes_, &added_}) {
    for (const auto& lane : *lanes) ::close(lane->ring->socket());
  }
}

std::vector<uint64_t> Lanes::take_over() {
  over_bell_.disarm();
  over_bell_.arm();
  return over_.take();
}

bool Lanes::turn() {
  bool worked = std::exchange(rung_, false);
  if (has_added_.load()) {
    const std::lock_guard lock(mutex_);
    has_added_.store(false);
    for (auto& lane : std::exchange(added_, {})) lanes_.push_back(std::move(lane));
    worked = true;
  }
  for (const auto& work : called_back_.take()) {
    work();
    worked = true;
  }
  const bool draining = draining_.load(std::memory_order_relaxed);
  bool any_over = false;
  for (const auto& lane : lanes_) {
    const size_t taken = lane->closing ? 0 : take(lane);
    worked |= taken > 0;
    lane->closing |= draining && taken < posted_.size();
    any_over |= lane->closing && lane->jobs.empty();
  }
  if (!any_over) return worked;
  const std::lock_guard lock(mutex_);
  std::erase_if(lanes_, [this](const std::shared_ptr<Lane>& lane) {
    if (!lane->closing || !lane->jobs.empty()) return false;
    epoll_ctl(epoll_, EPOLL_CTL_DEL, lane->ring->socket(), nullptr);
    lane->ring->shut_down();
    over_.add(lane->number);
    return true;
  });
  over_bell_.ring();
  return true;
}

size_t Lanes::take(const std::shared_ptr<Lane>& lane) {
  const size_t count = lane->ring->take(posted_);
  for (size_t i = 0; i < count && !lane->closing; ++i) take_one(lane, posted_[i]);
  if (!lane->ring->reason().empty() && !lane->closing) close(*lane, lane->ring->reason());
  return count;
}

void Lanes::take_one(const std::shared_ptr<Lane>& lane, const Posted& posted) {
  const auto known = lane->jobs.find(posted.slot);
  if (posted.kind == kCancel) {
    if (known != lane->jobs.end()) engine_.cancel(known->second);
    return;
  }
  if (known != lane->jobs.end()) {
    return close(*lane, "slot " + std::to_string(posted.slot) + " was posted again before its answer");
  }
  auto job = std::make_shared<LaneJob>(*this, lane, posted);
  lane->jobs.emplace(posted.slot, job);
  job->arrived_ns = monotonic_ns();
  job->identity = lane->identity;
  job->caller = lane->caller;
  std::array<char, kMaxRequestBytes> bytes;
  const std::string_view received = lane->ring->message(posted, bytes);
  auto parsed = parse_message(received);
  const auto* message = std::get_if<Message>(&parsed);
  if (message == nullptr) return admit(job, std::get<Refusal>(std::move(parsed)));
  job->request_id = message->request_id;
  job->layer = message->layer;
  job->traceparent = message->traceparent.substr(0, 64);
  if (auto refusal = engine_.place(*message, *lane, job.get())) return admit(job, std::move(refusal));
  if (!job->request.checked || job->tensors.on_device || job->tensors.hidden.size() <= kLongSum) {
    return admit(job, engine_.check_tensors(*message, job->tensors, job.get()));
  }
  job->received = received;
  engine_.hand_out([this, job] {
    const auto message = std::get<Message>(parse_message(job->received));
    call_back([this, job, refusal = engine_.check_tensors(message, job->tensors, job.get())] { admit(job, refusal); });
  });
}

void Lanes::admit(const std::shared_ptr<LaneJob>& job, std::optional<Refusal> refusal) {
  if (!refusal) refusal = engine_.submit(job);
  if (!refusal) return;
  engine_.tally().turned_away(*refusal, job->request_id, job->layer, job->caller, job->identity, job->traceparent,
                              job->arrived_ns);
  job->turn_away(*refusal);
}

void Lanes::call_back(std::function<void()> work) {
  called_back_.add(std::move(work));
  engine_.wake();
}

void Lanes::close(Lane& lane, const std::string& reason) {
  lane.ring->end(reply_refusal(0, {Code::kInvalidArgument, reason}));
  leave(lane);
}

void Lanes::leave(Lane& lane) {
  lane.closing = true;
  for (const auto& [slot, job] : lane.jobs) engine_.cancel(job);
}

bool Lanes::arm() {
  bool quiet = true;
  // Of lanes that were not looked at yet, too: all are armed, whatever the first says.
  for (const auto& lane : lanes_) quiet &= lane->closing || lane->ring->arm();
  return quiet;
}

void Lanes::disarm() {
  for (const auto& lane : lanes_) lane->ring->disarm();
}

void Lanes::sleep(int64_t ns) {
  if (std::any_of(lanes_.begin(), lanes_.end(), [](const auto& lane) { return lane->is_silent(); })) {
    ns = ns < 0 ? kLookNs : std::min(ns, kLookNs);
  }
  if (ns > 0) {
    pollfd waiting{.fd = epoll_, .events = POLLIN, .revents = 0};
    const timespec timeout{ns / 1'000'000'000, ns % 1'000'000'000};
    ppoll(&waiting, 1, &timeout, nullptr);
  }
  std::array<epoll_event, kEvents> events;
  const int count = epoll_wait(epoll_, events.data(), kEvents, ns < 0 ? -1 : 0);
  for (int i = 0; i < count; ++i) {
    auto* lane = static_cast<Lane*>(events[i].data.ptr);
    if (lane == nullptr) continue;
    if (lane->ring->drain()) {
      rung_ |= lane->is_silent();
      continue;
    }
    epoll_ctl(epoll_, EPOLL_CTL_DEL, lane->ring->socket(), nullptr);
    leave(*lane);
  }
}

bool LaneJob::is_slow_to_complete() const {
  // The engine's thread never waits for others, as rounding that spreads does.
  return request.rounds() ? request.computed_bytes() > PIECE_BYTES
                          : sums_are_checked() && request.reply_bytes() > kLongSum;
}

void LaneJob::complete() {
  checksum_ = reply_checksum(request.request_id, reply, sums_are_checked() ? request.reply_bytes() : 0);
}

void LaneJob::settle(Outcome outcome) {
  // Until then the device may write to the sums, and the caller must not take them for free.
  if (!outcome.over) return;
  // An answer that was given before is not completed any more.
  if (!outcome.told && !outcome.refusal) outcome.refusal = {Code::kUnavailable, "the server had given this call up"};
  if (outcome.refusal) {
    if (!lane_->cut.load()) turn_away(*outcome.refusal);
    return leave();
  }
  const auto answer = [this] {
    lane_->ring->answer(posted_, reply_head(request, 0) + reply_tail(request, seconds, checksum_) + appendix, 0,
                        receipt());
    leave();
  };
  if (!is_slow_to_complete()) return answer();
  // Completed by a thread of the pool.
  lanes_.call_back([self = shared_from_this(), answer] { answer(); });
}

void LaneJob::turn_away(const Refusal& refusal) {
  lane_->ring->answer(posted_, reply_refusal(request_id, refusal), static_cast<uint32_t>(refusal.code), 0);
  leave();
}

uint32_t LaneJob::receipt() const {
  uint32_t sum = surplus;
  for (size_t expert = 0; expert < request.pairs.size(); ++expert) {
    sum += request.pairs[expert] * receipt_term(request.owned->experts[expert]);
  }
  return sum;
}

void LaneJob::leave() {
  // The last to know this job, perhaps.
  lane_->jobs.erase(posted_.slot);
}

bool LaneJob::disconnect() {
  cut(*lane_);
  return true;
}

}  // namespace expertd
