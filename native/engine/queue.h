// Which waiting jobs become the next batch: fair between identities and their connections, merged by kind.
#pragma once

#include <cstdint>
#include <list>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/job.h"

namespace expertd {

// One connection's waiting jobs of one kind, in the order in which they came.
struct Lot {
  Kind kind;
  Line* line;
  Job* first = nullptr;
  Job* last = nullptr;
  std::list<Lot>::iterator place = {};
};

// All that one connection has waiting.
struct Line {
  std::string caller;
  Share* share;
  std::list<Lot> lots = {};
  std::list<Line>::iterator place = {};
};

// All that the connections of one identity have waiting, in the order of their turns.
struct Share {
  std::string identity;
  std::list<Line> lines = {};
  std::unordered_map<std::string, Line*> by_caller = {};
  std::list<Share>::iterator place = {};
};

// Waiting jobs, first come first served for each connection; identities take turns, and so do the connections of each:
// one with a thousand waiting jobs delays another one's single job by one batch. Used by one thread. Jobs are lent: who
// puts them in keeps them alive.
class FairQueue {
 public:
  bool empty() const { return shares_.empty(); }
  uint64_t tokens() const { return tokens_; }

  void put(Job* job);
  // Takes out a job; whether it still waited.
  bool remove(Job* job);
  // Takes out a batch: the job that waits longest of the connection whose turn it is, of the identity whose turn it is,
  // and from all identities in turn, of each from all connections in turn, what else there is of its kind, as far as it
  // fits in `max_tokens`. Only that identity, and in it that connection, move to the end.
  std::vector<Job*> take(uint64_t max_tokens);
  // Takes out everything.
  std::vector<Job*> take_all();

 private:
  void unlink(Job* job);
  void end_turn(const std::string& identity, const std::string& caller);

  std::list<Share> shares_;
  std::unordered_map<std::string, Share*> by_identity_;
  uint64_t tokens_ = 0;
  uint64_t last_number_ = 0;
};

}  // namespace expertd
