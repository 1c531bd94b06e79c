#include "engine/failpoints.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "request/wire.h"

namespace expertd {
namespace {

constexpr double kForever = 1e9;
constexpr char kDeviceError[] = "failpoint device_error";

}  // namespace

void Failpoints::add(const std::string& kind, double probability, double seconds) {
  // A generator for each kind: one kind's chances do not depend on which others there are.
  const std::string name = seed_ + "/" + kind;
  std::seed_seq seed(name.begin(), name.end());
  points_.insert_or_assign(kind, Point{probability, std::min(seconds, kForever), std::mt19937(seed)});
  bell_.arm();
}

bool Failpoints::comes_up(const std::string& kind) {
  const auto found = points_.find(kind);
  if (found == points_.end()) return false;
  const std::lock_guard lock(mutex_);
  // Not by the library's distributions, whose choices are its own.
  return found->second.chance() / 4294967296.0 < found->second.probability;
}

void Failpoints::record(const std::string& kind, const std::string& caller) {
  strikes_.add({kind, caller});
  bell_.ring();
}

bool Failpoints::strikes(const std::string& kind) {
  if (!comes_up(kind)) return false;
  record(kind);
  return true;
}

std::vector<Failpoints::Strike> Failpoints::take_strikes() {
  bell_.disarm();
  bell_.arm();
  return strikes_.take();
}

void Failpoints::check_device() const {
  if (device_failed_.load()) throw std::runtime_error(kDeviceError);
}

void Failpoints::before(Batch* batch) {
  if (strikes("crash_before")) die();
  if (strikes("stuck_device")) std::this_thread::sleep_for(std::chrono::duration<double>(seconds("stuck_device")));
  // Like an illegal address on a GPU: whatever comes after it fails too.
  if (!device_failed_.load() && strikes("device_error")) device_failed_.store(true);
  batch->device_failed = device_failed_.load();
  if (batch->device_failed) {
    batch->failure = Refusal{Code::kInternal, std::string("the device failed: RuntimeError: ") + kDeviceError};
  }
}

void Failpoints::after() {
  if (strikes("crash_after")) die();
}

void Failpoints::die() {
  // Whoever takes the strike kills the process, once the log has it.
  for (;;) pause();
}

void Failpoints::alter(const Tensors& tensors) {
  const std::string_view hidden = tensors.hidden;
  // What is on a GPU is never written here.
  if (tensors.on_device || hidden.empty() || !strikes("corrupt_request")) return;
  // Memory of its caller, or bytes of Python's that nobody else has yet.
  const_cast<char&>(hidden[hidden.size() / 2]) ^= 0x10;
}

void Failpoints::alter(Job* job) {
  const Admitted& request = job->request;
  // What is on a GPU is never written here.
  if (!is_on_device(job->reach) && strikes("corrupt_reply")) job->reply[request.reply_bytes() / 2] ^= std::byte{0x10};
  if (!strikes("wrong_receipt")) return;
  // A repeated field goes on where it occurs again: one more pair of this server's first expert.
  std::string expert, pairs;
  put_varint(&expert, request.owned->experts.front());
  put_varint(&pairs, request.tokens + 1);
  put_bytes(&job->appendix, 5, expert);
  put_bytes(&job->appendix, 6, pairs);
  job->surplus = request.tokens + 1;
}

bool Failpoints::withhold(const std::shared_ptr<Job>& job, uint64_t now) {
  double late = 0;
  for (const char* kind : {"drop", "delay"}) {
    if (strikes(kind)) late += seconds(kind);
  }
  if (comes_up("reset")) {
    record("reset", job->disconnect() ? "" : job->caller);
    late = kForever;
  }
  if (late == 0) return false;
  withheld_.push_back({job, now + static_cast<uint64_t>(late * 1e9)});
  return true;
}

bool Failpoints::release(const Job* job) {
  return std::erase_if(withheld_, [job](const Withheld& one) { return one.job.get() == job; }) > 0;
}

std::vector<std::shared_ptr<Job>> Failpoints::release_due(uint64_t now) {
  std::vector<std::shared_ptr<Job>> due;
  std::erase_if(withheld_, [&](Withheld& one) {
    if (one.until > now) return false;
    due.push_back(std::move(one.job));
    return true;
  });
  return due;
}

uint64_t Failpoints::sooner(uint64_t due) const {
  for (const Withheld& one : withheld_) due = due == 0 ? one.until : std::min(due, one.until);
  return due;
}

}  // namespace expertd
