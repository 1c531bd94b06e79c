// Faults on purpose, for tests.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/owned.h"
#include "engine/batch.h"
#include "engine/bell.h"
#include "engine/job.h"
#include "engine/pile.h"

namespace expertd {

// The faults that a process was started with: server/failpoints.py reads them, and does what Python has to do once one
// has struck. docs/testing.md says what each kind is.
class Failpoints : public Owned {
 public:
  struct Strike {
    std::string kind;
    std::string caller;  // whose connection is to be ended; or empty
  };

  // The same `seed` repeats each kind's strikes.
  explicit Failpoints(std::string seed) : seed_(std::move(seed)) {}
  // Before anything strikes.
  void add(const std::string& kind, double probability, double seconds);

  // From any thread -------------------------------------------------------------------------------------------------

  bool strikes(const std::string& kind);
  // How long a kind lasts that can strike.
  double seconds(const std::string& kind) const { return points_.at(kind).seconds; }
  // Readable when there is something for `take_strikes`.
  int fd() const { return bell_.fd(); }
  std::vector<Strike> take_strikes();
  // Throws once the device has failed.
  void check_device() const;
  // Strikes a request that is about to be checked.
  void alter(const Tensors& tensors);
  // Strikes the answer to a job, which is complete.
  void alter(Job* job);

  // The engine's thread ---------------------------------------------------------------------------------------------

  // Strikes a batch that is to start, and fails it if the device has failed.
  void before(Batch* batch);
  // Strikes once a batch is over.
  void after();
  // Whether the answer to a job is to come later, or never.
  bool withhold(const std::shared_ptr<Job>& job, uint64_t now);
  // Lets go of a withheld job; whether it was one.
  bool release(const Job* job);
  // Lets go of those whose time has come.
  std::vector<std::shared_ptr<Job>> release_due(uint64_t now);
  // When the next one's time will come, if that is before `due`; 0: never.
  uint64_t sooner(uint64_t due) const;

 private:
  struct Point {
    double probability, seconds;
    std::mt19937 chance;
  };
  struct Withheld {
    std::shared_ptr<Job> job;
    uint64_t until;
  };

  [[noreturn]] static void die();
  bool comes_up(const std::string& kind);
  void record(const std::string& kind, const std::string& caller = {});

  const std::string seed_;
  std::mutex mutex_;  // of the chances
  std::map<std::string, Point> points_;
  Pile<Strike> strikes_;
  Bell bell_;
  std::atomic<bool> device_failed_{false};
  std::vector<Withheld> withheld_;
};

}  // namespace expertd
