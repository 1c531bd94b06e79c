// Which waiting jobs become the next batch: fair between callers, merged by kind.
#pragma once

#include <cstdint>
#include <list>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/job.h"

namespace expertd {

// One caller's waiting jobs of one kind, in the order in which they came.
struct Lot {
  Kind kind;
  Job* first = nullptr;
  Job* last = nullptr;
  std::list<Lot>::iterator place;
};

// All that one caller has waiting; kinds in the order in which they began to wait.
struct Share {
  std::string caller;
  std::list<Lot> lots;
  std::list<Share>::iterator place;
};

// Waiting jobs, first come first served for each caller, callers taking turns: one with a thousand waiting jobs delays
// another one's single job by one batch. Used by one thread. Jobs are lent: who puts them in keeps them alive.
class FairQueue {
 public:
  bool empty() const { return shares_.empty(); }
  uint64_t tokens() const { return tokens_; }

  void put(Job* job);
  // Takes out a job; whether it still waited.
  bool remove(Job* job);
  // Takes out a batch: the job that waits longest of the caller whose turn it is, and from all callers in turn what
  // else there is of its kind, as far as it fits in `max_tokens`. Only that caller moves to the end.
  std::vector<Job*> take(uint64_t max_tokens);
  // Takes out everything.
  std::vector<Job*> take_all();

 private:
  void unlink(Job* job);

  std::list<Share> shares_;
  std::unordered_map<std::string, Share*> by_caller_;
  uint64_t tokens_ = 0;
};

}  // namespace expertd
