#include "base/spin.h"

#include <algorithm>
#include <utility>

namespace expertd {
namespace {

constexpr int64_t kMarginNs = 20'000;
constexpr int64_t kLeastQuietNs = 5'000'000;
constexpr int64_t kMostQuietNs = 1'000'000'000;
constexpr int64_t kLookNs = 1'000'000'000;
constexpr double kMinCpus = 4;

}  // namespace

Spin::Turn Spin::begin(int64_t now) {
  const int64_t budget = budget_ns_.load(std::memory_order_relaxed);
  return budget == 0 ? Turn{} : begin_until(now, now + budget);
}

Spin::Turn Spin::begin_until(int64_t now, int64_t until) {
  if (max_ns_ == 0) return {};
  look(now);
  const double cpus = cpus_.load(std::memory_order_relaxed);
  if (cpus < kMinCpus || now < quiet_until_.load(std::memory_order_relaxed)) return {};
  if (host_.spinning.fetch_add(1, std::memory_order_relaxed) + 1 > cpus / 4) {
    host_.spinning.fetch_sub(1, std::memory_order_relaxed);
    return {};
  }
  return {until, host_.preemptions()};
}

void Spin::end(const Turn& turn, int64_t now) {
  if (turn.until == 0) return;
  host_.spinning.fetch_sub(1, std::memory_order_relaxed);
  if (host_.preemptions() == turn.preemptions) return;
  const int64_t last = quiet_ns_.load(std::memory_order_relaxed);
  const bool again = last != 0 && now - quiet_until_.load(std::memory_order_relaxed) < 4 * last;
  const int64_t quiet = again ? std::min(2 * last, kMostQuietNs) : kLeastQuietNs;
  quiet_ns_.store(quiet, std::memory_order_relaxed);
  quiet_until_.store(now + quiet, std::memory_order_relaxed);
}

void Spin::learn(int64_t gap_ns) {
  const uint32_t count = learnt_.fetch_add(1, std::memory_order_relaxed);
  gaps_[count % kGaps].store(gap_ns, std::memory_order_relaxed);
  std::array<int64_t, kGaps> gaps;
  const size_t known = std::min<size_t>(count + 1, kGaps);
  for (size_t i = 0; i < known; i++) gaps[i] = gaps_[i].load(std::memory_order_relaxed);
  std::nth_element(gaps.begin(), gaps.begin() + known / 2, gaps.begin() + known);
  const int64_t budget = 2 * gaps[known / 2] + kMarginNs;
  budget_ns_.store(budget <= max_ns_ ? budget : 0, std::memory_order_relaxed);
}

// Files are read for it: once a second.
void Spin::look(int64_t now) {
  int64_t due = next_look_.load(std::memory_order_relaxed);
  if (now < due || !next_look_.compare_exchange_strong(due, now + kLookNs, std::memory_order_relaxed)) return;
  cpus_.store(host_.usable_cpus(), std::memory_order_relaxed);
  const int64_t throttles = host_.throttles();
  const int64_t before = throttles_.exchange(throttles, std::memory_order_relaxed);
  if (before >= 0 && throttles != before) quiet_until_.store(now + kMostQuietNs, std::memory_order_relaxed);
}

bool WorkSpin::goes_on(int64_t now, bool under_way) {
  if (spin_ == nullptr) {
    spin_ = under_way ? &busy_ : &idle_;
    since_ = now;
    turn_ = spin_->begin(now);
  }
  if (now < turn_.until) return true;
  stop(now);
  return false;
}

bool WorkSpin::goes_on_until(int64_t now, int64_t until) {
  turn_ = spin_->begin_until(now, until);
  return turn_.until != 0;
}

void WorkSpin::found(int64_t now) {
  if (spin_ == nullptr) return;
  stop(now);
  std::exchange(spin_, nullptr)->learn(now - since_);
}

void WorkSpin::stop(int64_t now) { spin_->end(std::exchange(turn_, {}), now); }

}  // namespace expertd
