// Computes batches with CUDA graphs, on one thread that never waits for the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda/bay.h"
#include "cuda/copier.h"
#include "cuda/driver.h"
#include "cuda/layout.h"
#include "cuda/ledger.h"
#include "engine/batch.h"

namespace expertd::cuda {

// Computes batches on one GPU: copies and kernels of successive batches overlap, and so do those of a large batch's
// parts.
//
// Made, filled with graphs and destroyed by any thread while no batch is under way; used by one thread in between.
class CudaExecutor final : public Executor {
 public:
  struct Options {
    int device = 0;
    size_t depth = 2;  // bays, beside one for small batches if there is an express stream
    Shape shape;
    std::vector<uint32_t> classes;   // tokens that parts are padded to, ascending; the last is all that kernels take
    uint32_t max_tokens = 0;         // of a batch
    uint32_t overlap_tokens = 4096;  // of a part, if the host has any of its rows: copies overlap with other parts
    uint32_t time_every = 1;         // of so many small batches of one kind, one is timed
    size_t piece_bytes = 128 << 10;  // what the copier is given at once, at least; at most `kPinStep`
    uint32_t express_rows = 256;     // graphs of up to so many are launched on the express stream; 0: none
  };

  // Allocates all memory. `driver` outlives it. Throws `DeviceError`.
  CudaExecutor(const Driver& driver, Options options, std::shared_ptr<Copier> copier);
  // What the device or the copier may yet use is leaked.
  ~CudaExecutor() override;

  const Options& options() const { return options_; }
  // Lets the calling thread use the device; a thread that starts batches does so by that.
  void enter() const { context_.enter(); }
  // How a batch is cut; `on_host`: whether any of its rows are there.
  Cut cut(uint32_t tokens, bool on_host) const;
  Layout layout(uint32_t tokens, Dtype hidden_dtype, Dtype reply_dtype) const;
  // Where a bay has the first part of a batch.
  Addresses addresses(size_t bay, const Layout& layout) const { return bays_[bay].addresses(layout); }
  // Takes the graphs captured for a size class in the first bay, with the weights of any layer: one, or steps for
  // requests in another device's memory. Throws `DeviceError`.
  void add_graphs(const Layout& layout, const std::vector<void*>& graphs, const std::array<Range, 4>& layer);

  // Takes a graph of one kernel, captured to add the sums that so many devices have: [rows, hidden size] each, in FP32,
  // into rows of `dtype`, one block in its first dimension a row. Throws `DeviceError`.
  void add_adder(size_t parts, Dtype dtype, void* graph, Range result, const std::vector<Range>& captured);
  // Null: none was captured.
  LoneKernel* adder(size_t parts, Dtype dtype);
  // For what has been kept of a batch, until it is released.
  Bay& bay(size_t index) { return bays_[index]; }
  void release(size_t bay);
  const Driver& driver() const { return driver_; }
  const Context& context() const { return context_; }
  Copier* copier() const { return copier_.get(); }

  size_t depth() const override { return options_.depth; }
  bool has_express() const override { return options_.express_rows > 0; }
  void start(std::unique_ptr<Batch> batch, uint64_t now_ns) override;
  std::unique_ptr<Batch> poll(uint64_t now_ns) override;
  uint64_t due_ns() const override;
  // After a failure of the device: lets batches start again, if it has become idle without an error. Whether it has.
  bool resume();

 private:
  enum class Phase {
    kStaging,   // until everything is enqueued
    kLaunched,  // until the end word is seen
    kFailed,    // a call failed: until the device uses none of the batch's memory
    kEnding     // until copies between host memory are made
  };

  // A batch under way.
  struct Run {
    std::unique_ptr<Batch> batch;
    size_t bay, parts;
    Entry* entry;
    uint64_t started_ns;
    Phase phase = Phase::kStaging;
    double staging = 0;                                     // seconds until the first copy of the device
    uint64_t launched_ns = 0, query_ns = 0, ending_ns = 0;  // the second: when to ask the device about it next
  };

  Bay& bay_of(const Run& run) { return bays_[run.bay]; }
  // A free one for a batch; their number if there is none.
  size_t free_bay(bool express) const;
  // The largest batch that comes to a bay.
  uint32_t most_tokens(size_t bay) const;
  // What computes a batch; null: nothing was captured.
  Entry* entry_for(const Batch& batch, const Layout& layout, const Cut& cut);
  // Why a batch cannot be computed.
  std::string obstacle(const Batch& batch) const;
  void refuse(std::unique_ptr<Batch> batch, std::string text);
  // Starts what has a bay by now.
  void start_waiting(uint64_t now_ns);
  // Takes a batch as far as it can go by now; whether it came back.
  bool advance(Run& run, uint64_t now_ns);
  void feed(Run& run, uint64_t now_ns);
  void look(Run& run, uint64_t now_ns);
  void look_at_failed(Run& run, uint64_t now_ns);
  void fetch(Run& run, uint64_t now_ns);
  void fail(Run& run, std::string text, bool device_failed);

  const Driver& driver_;
  const Options options_;
  const std::shared_ptr<Copier> copier_;
  const Context context_;
  const Streams streams_;
  std::deque<Bay> bays_;
  std::vector<bool> busy_;           // by bay
  std::vector<uint32_t> most_rows_;  // by bay, of a part of any batch that comes to it
  Ledger ledger_;
  std::map<std::pair<size_t, Dtype>, LoneKernel> adders_;  // by parts and dtype
  std::list<Run> runs_;                                    // in the order in which they were started
  std::deque<std::unique_ptr<Batch>> waiting_;             // for a bay
  std::deque<std::unique_ptr<Batch>> finished_;
  std::string lost_;  // why nothing is computed any more; else empty
};

}  // namespace expertd::cuda
