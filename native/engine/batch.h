// Jobs that the device computes together, and what computes them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/waker.h"
#include "engine/job.h"

namespace expertd {

// Batches of fewer tokens are small: they gain more by growing while another small one is under way than by overlapping
// with it, and are copied in, computed and copied out one after another.
inline constexpr uint32_t kSmallTokens = 256;

// Seconds that a batch spent in each stage on the device.
struct DeviceSeconds {
  double copy_in = 0, compute = 0, copy_out = 0;
  bool measured = true;  // on this batch; else on an earlier one of its kind
};

// Jobs of one kind that the device computes together. Its jobs' memory is lent to whoever executes it.
struct Batch {
  std::vector<std::shared_ptr<Job>> jobs;  // all with a place for their sums
  uint64_t tokens = 0;
  uint64_t started_ns = 0;
  bool alone = false;                  // small, and with nothing that could overlap it
  bool express = false;                // small, and in the place that an executor has for such
  bool for_nothing = false;            // no job wants an expert: the sums are zeros, which need no device
  std::atomic<bool> has_room = false;  // whether all its jobs have been given room for their sums
  bool keeps_sums = false;             // where the device has them, until it is told that nobody wants them any more

  // What became of it. The sums are in their places, unless it failed.
  std::vector<uint32_t> pairs;  // counted by the device, of each local expert
  DeviceSeconds seconds;
  std::optional<Refusal> failure;
  bool device_failed = false;  // the failure may be the device's, and not of this batch alone
  std::string fault;           // of a device for which another one computed: nothing failed then
  bool stranded = false;       // failed, and a device may use its memory for ever
  size_t bay = 0;              // where the sums are that it keeps

  const Admitted& first() const { return jobs.front()->request; }
};

// What computes batches: CUDA graphs, or Python threads that fetch them. Used by the engine's thread, which it never
// blocks. Times are CLOCK_MONOTONIC.
class Executor {
 public:
  virtual ~Executor() = default;
  // Batches that may be under way at once.
  virtual size_t depth() const = 0;
  // Whether a small one may be beside those: `Batch::express` says which one it is.
  virtual bool has_express() const { return false; }
  // Takes a batch, which comes back from `poll` whatever becomes of it.
  virtual void start(std::unique_ptr<Batch> batch, uint64_t now_ns) = 0;
  // A batch that is over; null when there is none.
  virtual std::unique_ptr<Batch> poll(uint64_t now_ns) = 0;
  // When the next of the batches under way will be over, judging by the last of its kind, or must be looked at again;
  // 0: it wakes the engine by itself.
  virtual uint64_t due_ns() const { return 0; }

  // `wake`, which any thread may call, makes the engine look for batches that are over.
  // Not any more once another one is given.
  void on_done(std::function<void()> wake) { waker_.set(std::move(wake)); }

 protected:
  void wake() { waker_.wake(); }

 private:
  Waker waker_;
};

}  // namespace expertd
