// Adds up what several GPUs computed of a batch, each its share of the rows, over peer access.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "cuda/executor.h"
#include "engine/node.h"

namespace expertd::cuda {

// Each GPU that computed reads the others' sums of its share of the rows, adds them in the order of GPUs and moves the
// result out by its own way. It begins when the host has seen that all have computed: no stream waits for another
// GPU's, so that one that fails stops none of the others.
class PeerAdder final : public Adder {
 public:
  // Null unless all are GPUs of which each reaches each other's memory, and no more than `kMostParts`. From then on
  // they do so. Throws `DeviceError`.
  static std::shared_ptr<PeerAdder> make(const std::vector<std::shared_ptr<Executor>>& devices);
  // What GPUs may yet use is leaked.
  ~PeerAdder() override;

  bool takes(const Batch& batch, size_t devices) const override;
  void start(Batch* whole, std::vector<std::pair<size_t, const Batch*>> parts, uint64_t now_ns) override;
  Batch* poll(uint64_t now_ns, size_t* failed_device) override;
  uint64_t due_ns() const override;
  void forsake(size_t device) override;
  void release(size_t device, const Batch& part) override;

 private:
  // What one GPU does of it.
  struct Share {
    size_t device, bay;
    bool launched = false, ended = false;
  };
  struct Adding {
    Batch* whole;
    std::vector<Share> shares;
    uint64_t started_ns, query_ns;
    size_t failed = 0;  // its failure is the batch's
  };

  explicit PeerAdder(std::vector<std::shared_ptr<CudaExecutor>> devices) : devices_(std::move(devices)) {}
  void launch(Adding& adding, Share& share, uint32_t first, uint32_t end);
  // Whether nothing of it is under way any more.
  bool advance(Adding& adding, uint64_t now_ns);
  static void fail(Adding& adding, size_t device, std::string text);
  uint64_t expected_ns(const Batch& whole) const;

  std::vector<std::shared_ptr<CudaExecutor>> devices_;
  std::list<Adding> under_way_;
  std::map<uint64_t, uint64_t> took_ns_;  // by tokens, in powers of two, the last time
};

}  // namespace expertd::cuda
