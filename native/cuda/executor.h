// Computes batches with CUDA graphs, on one thread that never waits for the device.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <list>
#include <string>
#include <vector>

#include "cuda/batch.h"
#include "cuda/bay.h"
#include "cuda/driver.h"
#include "cuda/layout.h"
#include "cuda/ledger.h"

namespace expertd::cuda {

// Computes batches on one GPU: copies and kernels of successive batches overlap.
//
// Made, filled with graphs and destroyed by any thread while no batch is under way; used by one thread in between.
class CudaExecutor final : public Executor {
 public:
  struct Options {
    int device = 0;
    size_t depth = 2;  // bays
    Shape shape;
    std::vector<uint32_t> classes;  // tokens that batches are padded to, ascending; the last bounds a batch
    uint32_t time_every = 1;        // of so many small batches of one kind, one is timed
  };

  // Allocates all memory. `driver` and `copier` outlive it. Throws `DeviceError`.
  CudaExecutor(const Driver& driver, Options options, Copier* copier);
  // What the device may yet use is leaked.
  ~CudaExecutor() override;

  const Options& options() const { return options_; }
  Layout layout(uint32_t tokens, uint8_t hidden_dtype, uint8_t reply_dtype) const;
  const Bay& bay(size_t index) const { return bays_[index]; }
  // Takes a graph captured for batches of a size class in bay `index`, with the weights of any layer. Throws
  // `DeviceError`.
  void add_graph(size_t index, const Layout& layout, void* graph, const std::array<Range, 4>& layer);

  size_t depth() const override { return options_.depth; }
  void start(Batch* batch, uint64_t now_ns) override;
  Batch* poll(uint64_t now_ns) override;
  uint64_t due_ns() const override;
  // After a failure of the device: lets batches start again, if it has become idle without an error. Whether it has.
  bool resume();

 private:
  enum class Phase { kStaging, kLaunched, kFailed, kFetching };

  // A batch under way.
  struct Run {
    Run(Batch* batch, size_t bay, Entry* entry) : batch(batch), bay(bay), entry(entry) {}

    Batch* batch;
    size_t bay;
    Entry* entry;
    Phase phase = Phase::kStaging;
    std::atomic<bool> copied = false;        // whether the copies between host memory are all made
    uint64_t copying_ns = 0;                 // when they began
    double staging = 0;                      // seconds that those to the bay took
    uint64_t launched_ns = 0, query_ns = 0;  // when it was launched, when to ask the device about it next
  };

  Bay& bay_of(const Run& run) { return bays_[run.bay]; }
  // The size class of a batch that can be computed, or 0 and why it cannot.
  uint32_t class_of(const Batch& batch, std::string* error) const;
  void refuse(Batch* batch, std::string error);
  // Takes a batch as far as it can go by now; whether it came back.
  bool advance(Run& run, uint64_t now_ns);
  bool advance_launched(Run& run, uint64_t now_ns);
  bool advance_failed(Run& run, uint64_t now_ns);
  void copy(Run& run, const std::vector<Copy>& copies, uint64_t now_ns);
  void launch(Run& run, uint64_t now_ns);
  void fetch(Run& run, uint64_t now_ns);
  // Gives back the batch, as it is or with an error, and the bay. True: it came back.
  bool finish(const Run& run);
  bool fail(const Run& run, std::string error, bool device_lost);

  const Driver& driver_;
  const Options options_;
  Copier* const copier_;
  const Context context_;
  const Streams streams_;
  std::deque<Bay> bays_;
  std::vector<bool> busy_;  // by bay
  Ledger ledger_;
  std::list<Run> runs_;  // in the order in which they were started
  std::deque<Batch*> finished_;
  std::string lost_;  // why nothing is computed any more; else empty
};

}  // namespace expertd::cuda
