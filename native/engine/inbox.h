// Where an event loop finds what became of its requests.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

#include "engine/bell.h"
#include "engine/job.h"
#include "engine/pile.h"

namespace expertd {

// Where one event loop finds what became of its requests. All but push() is for the loop's thread.
class Inbox {
 public:
  // What became of one job.
  struct Answer {
    uint64_t ticket = 0;
    Outcome outcome;
  };

  // The loop watches this descriptor and calls drain() when it is readable.
  int fd() const { return bell_.fd(); }

  // Names a job that will be answered here, and keeps it until then.
  uint64_t open(std::shared_ptr<Job> job);
  // The job with this name; null once it is over.
  std::shared_ptr<Job> find(uint64_t ticket) const;
  // Forgets a job that is over.
  void close(uint64_t ticket) { jobs_.erase(ticket); }
  size_t size() const { return jobs_.size(); }

  // From any thread.
  void push(Answer answer);
  std::vector<Answer> drain();

 private:
  Bell bell_;
  Pile<Answer> answers_;
  std::unordered_map<uint64_t, std::shared_ptr<Job>> jobs_;
  uint64_t last_ticket_ = 0;
};

}  // namespace expertd
