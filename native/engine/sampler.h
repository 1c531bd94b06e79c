// Now and then one token of an answered request, for who wants to compute it again.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <random>
#include <string>

#include "base/owned.h"
#include "engine/job.h"

namespace expertd {

// One token of an answered request, copied.
struct Sample {
  std::string model_fingerprint;  // of the weights that answered
  uint32_t layer = 0;
  Dtype hidden_dtype = Dtype::kFloat8E4M3FN;
  Dtype sums_dtype = Dtype::kBFloat16;
  std::string hidden, scales, ids, weights, sums;  // a row of each; ids are global, scales may be empty
};

// Copies samples of a share of all requests, before they are answered. `offer` is for the engine's thread.
class Sampler : public Owned {
 public:
  static constexpr size_t kWaiting = 8;  // further ones are dropped

  // `rate` is the share of requests of which a token is taken.
  Sampler(double rate, uint32_t seed) : rate_(rate), chance_(seed) {}

  // Perhaps takes a token of a job whose sums are in their place, in memory of the host.
  void offer(const Job& job);
  // Waits for the next one; nothing after `interrupt`.
  std::optional<Sample> take();
  // Forgets those that wait, and lets `take` return without one from now on.
  void interrupt();
  uint64_t dropped() const { return dropped_.load(std::memory_order_relaxed); }

 private:
  const double rate_;
  std::minstd_rand chance_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Sample> waiting_;
  std::atomic<uint64_t> dropped_{0};
  bool interrupted_ = false;
};

}  // namespace expertd
