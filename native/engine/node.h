// Several devices as one executor: each computes its experts' pairs, and the sums are added.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/owned.h"
#include "engine/batch.h"
#include "engine/failpoints.h"

namespace expertd {

// Which device computes a pair of a local expert, of those that have it: the bits of its routing weight decide, so that
// the bits of a token's sums do not depend on its batch. `out_of_use`: bits of devices not to be chosen. Null: none is
// left.
const Home* home_of(const OwnedLayer& owned, uint32_t expert, uint32_t weight, uint64_t out_of_use);

// Adds up sums that devices have computed and kept. Used by the engine's thread, which it never blocks.
class Adder {
 public:
  virtual ~Adder() = default;
  // Whether it adds up what so many devices have of a batch. All of them are to compute all its jobs then.
  virtual bool takes(const Batch& batch, size_t devices) const = 0;
  // Begins to add up the sums of devices that computed `parts`, with their places in the node, and to put them where
  // `whole` wants them. Both stay until `poll` returns `whole`.
  virtual void start(Batch* whole, std::vector<std::pair<size_t, const Batch*>> parts, uint64_t now_ns) = 0;
  // A batch that is over, or null: its seconds of copying out, or the failure of a device.
  virtual Batch* poll(uint64_t now_ns, size_t* failed_device) = 0;
  virtual uint64_t due_ns() const = 0;
  // What a device does of batches under way counts as over: it hangs.
  virtual void forsake(size_t device) = 0;
  // Nobody wants what a device kept of a batch any more.
  virtual void release(size_t device, const Batch& part) = 0;
};

// Executes batches on several devices, each an executor that knows its own experts by their places in
// `OwnedLayer::devices`. A batch goes to those devices that it has pairs for. What more than one computed is added up
// by an adder, or on the host: each row's parts in FP32 to 0, in the order of devices, rounded once.
//
// Of a batch that a device failed to compute, others compute all, if they have all its experts.
class NodeExecutor final : public Executor, public Owned, public std::enable_shared_from_this<NodeExecutor> {
 public:
  static constexpr size_t kMostDevices = 64;

  // What became of a device's batches.
  struct Record {
    uint64_t batches = 0, failures = 0;
    double copy_in = 0, compute = 0, copy_out = 0;  // seconds
  };

  // `failpoints` and `adder` may be null: then what more than one device computed is added up on the host.
  NodeExecutor(std::vector<std::shared_ptr<Executor>> devices, std::shared_ptr<Failpoints> failpoints,
               std::shared_ptr<Adder> adder = nullptr);
  // What devices have not given back is leaked.
  ~NodeExecutor() override;

  size_t depth() const override;
  bool has_express() const override;
  void start(std::unique_ptr<Batch> batch, uint64_t now_ns) override;
  std::unique_ptr<Batch> poll(uint64_t now_ns) override;
  uint64_t due_ns() const override;

  // From any thread -------------------------------------------------------------------------------------------------

  // Computes nothing on a device any more. What one has that `hangs` comes back failed and stranded.
  void lose(size_t device, bool hangs);
  // Throws once a failpoint has killed a device.
  void check(size_t device) const;
  std::vector<Record> records() const;
  // Whether sums are added up where they are, if the adder takes them.
  bool adds_on_devices() const { return adder_ != nullptr; }
  // Seconds of adding, in all.
  double adding_seconds() const { return adding_seconds_.load(std::memory_order_relaxed); }

 private:
  // For FP32 sums of a device; whoever may write there keeps it.
  struct Sums {
    std::unique_ptr<std::byte[]> memory;
    size_t bytes = 0;
  };
  struct Piece;
  class PieceJob;
  // A batch under way.
  struct Run;

  void spread(std::shared_ptr<Run> run, uint64_t now_ns);
  std::unique_ptr<Batch> part_of(Run& run, size_t device);
  // Has a failpoint kill a device; whether it is dead.
  bool dies(size_t device);
  // By device, what it is to compute. False: an expert is nowhere.
  bool divide(const Batch& batch, uint64_t out_of_use, std::vector<std::vector<Piece>>* pieces) const;
  std::shared_ptr<Sums> room(size_t bytes);
  void take_back(size_t device, std::unique_ptr<Batch> part, uint64_t now_ns);
  void take_added(Batch* whole, size_t failed, uint64_t now_ns);
  // Has a batch computed again without a device that failed.
  static void fail(Run& run, size_t device, const Refusal& refusal);
  void settle(const std::shared_ptr<Run>& run, uint64_t now_ns);
  void add(const std::shared_ptr<Run>& run, uint64_t now_ns);
  void add_on_host(const std::shared_ptr<Run>& run);
  // What devices kept of it, but for those that hang and may yet use it.
  void release(Run& run);
  void finish(std::shared_ptr<Run> run);
  void strand(size_t device);

  const std::vector<std::shared_ptr<Executor>> devices_;
  const std::shared_ptr<Failpoints> failpoints_;
  const std::shared_ptr<Adder> adder_;
  std::atomic<uint64_t> lost_{0}, hanging_{0}, killed_{0};  // bits
  std::atomic<double> adding_seconds_{0};
  mutable std::mutex mutex_;  // of the records
  std::vector<Record> records_;

  // The engine's thread alone.
  uint64_t stranded_ = 0;  // bits: of those that hang, whose batches were given up
  std::vector<std::unordered_map<const Batch*, std::shared_ptr<Run>>> under_way_;  // by device
  std::vector<std::shared_ptr<Run>> adding_;                                       // by either means
  std::deque<std::unique_ptr<Batch>> finished_;
  std::vector<std::shared_ptr<Sums>> sums_;  // to be used again
};

}  // namespace expertd
