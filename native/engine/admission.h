// How much may wait, and whose requests leave for whose.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "engine/job.h"
#include "request/refusal.h"

namespace expertd {

// What requests take of the room there is.
struct Amount {
  uint64_t tokens = 0;
  uint64_t bytes = 0;  // of tensors
};

// A job that another identity's made leave, and what its caller is to be told.
struct Evicted {
  std::shared_ptr<Job> job;
  Refusal refusal;
};

// Bounds on what waits, in total: one identity alone may have all of it, and gives way to those that have less. Any
// thread; its lock is held for no more than a look at who has what.
class Admission {
 public:
  explicit Admission(Amount most) : most_(most) {}

  // Why a request of `identity` that takes `more` would be refused now.
  std::optional<Refusal> check(const std::string& identity, Amount more) const;
  // Gives room to a job, or refuses it. If need be the newest jobs of the identity that has most leave, as long as that
  // is more than the newcomer's would have: `evicted` gets them.
  std::optional<Refusal> admit(const std::shared_ptr<Job>& job, std::vector<Evicted>* evicted);
  // Takes back a job's room; false if it was evicted.
  bool release(Job& job);

  // Tells that the device took `seconds` for a batch of `tokens`, in the `express` place or not.
  void computed(uint64_t tokens, double seconds, bool express);
  Amount waiting() const;

 private:
  using Measure = uint64_t Amount::*;
  // What one identity has.
  struct Holding {
    Amount amount;
    std::list<std::shared_ptr<Job>> jobs;  // the newest last
  };

  // All below is for who has the lock.
  // The bound that `more` would exceed, or null.
  Measure exceeded(Amount more) const;
  // Who has most, if that is more than `identity` would have with `more`; else null.
  const Holding* largest(Measure measure, const std::string& identity, Amount more) const;
  void hold(const std::shared_ptr<Job>& job);
  void drop(Job& job);
  Refusal full(Measure bound, Amount more) const;
  Refusal evicted(Measure bound, uint64_t held) const;
  std::optional<double> delay(uint64_t tokens, uint64_t room) const;

  const Amount most_;
  mutable std::mutex mutex_;  // of all below
  Amount waiting_;
  std::map<std::string, Holding> holdings_;  // by identity
  double tokens_per_second_ = 0, express_tokens_per_second_ = 0;
};

}  // namespace expertd
