// Jobs that the device computes together, and what computes them.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/job.h"

namespace expertd {

// Jobs of one kind that the device computes together. Its jobs' memory is lent to whoever executes it.
struct Batch {
  std::vector<std::shared_ptr<Job>> jobs;
  uint64_t tokens = 0;
  uint64_t started_ns = 0;
  bool alone = false;  // small, and with nothing that could overlap it

  // What became of it.
  double compute_seconds = 0;
  std::optional<Refusal> failure;

  const Admitted& first() const { return jobs.front()->request; }
};

// What computes batches: CUDA graphs, or Python threads that fetch them. Called by the engine's thread only; nothing
// here blocks.
class Executor {
 public:
  virtual ~Executor() = default;
  // Batches that may be under way at once.
  virtual size_t depth() const = 0;
  virtual void start(std::unique_ptr<Batch> batch) = 0;
  // A batch that is over, its jobs' replies written or its failure set; null when there is none.
  virtual std::unique_ptr<Batch> poll() = 0;
};

}  // namespace expertd
