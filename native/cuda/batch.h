// What an executor is given and gives back: a batch of requests, their parts and times.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace expertd::cuda {

// Seconds that a batch spent in each stage.
struct Timings {
  double copy_in = 0, compute = 0, copy_out = 0;
  bool measured = false;  // on this batch; else on an earlier one of its kind
};

// One request of a batch. The memory is the job's, lent until the batch comes back from `poll`.
struct Part {
  const uint8_t* hidden = nullptr;  // [tokens, hidden size]
  const float* scales = nullptr;    // [tokens, hidden size / 128]; null for BF16
  const int32_t* ids = nullptr;     // [tokens, top_k]: local expert, or -1 for none
  const float* weights = nullptr;   // [tokens, top_k]
  uint8_t* sums = nullptr;          // [tokens, hidden size]
  uint32_t tokens = 0;
  bool pinned = false;  // the device may copy from `hidden` and to `sums` by itself
};

struct Batch {
  uint32_t layer = 0;
  uint8_t hidden_dtype = 0, reply_dtype = 0;  // the codes of proto/expert_shard.proto's DType
  uint32_t top_k = 0;
  uint32_t tokens = 0;  // of all parts
  std::vector<Part> parts;
  std::array<uint64_t, 4> weights{};  // where the device has the layer: up_gate, its scales, down, its scales

  // The results. The sums are in the parts' memory unless there is an error.
  std::vector<uint32_t> pairs;  // computed by local expert, over all parts
  Timings timings;
  std::string error;
  bool device_lost = false;  // nothing will be computed any more, unless somebody decides otherwise
  void* owner = nullptr;
};

// Computes batches. Used by one thread, which it never blocks.
class Executor {
 public:
  virtual ~Executor() = default;
  // Batches that may be under way at once.
  virtual size_t depth() const = 0;
  // Takes a batch, which comes back from `poll`, whatever becomes of it. Times are CLOCK_MONOTONIC.
  virtual void start(Batch* batch, uint64_t now_ns) = 0;
  // The next batch that is finished, or null.
  virtual Batch* poll(uint64_t now_ns) = 0;
  // When the next of the batches under way will be finished, judging by the last of its kind; 0: nobody knows.
  virtual uint64_t due_ns() const = 0;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// Makes copies between host memory that would hold up the engine's thread.
class Copier {
 public:
  virtual ~Copier() = default;
  // Begins `copies`; once all are made, stores true in `*done` (release), the last that it touches. Never blocks.
  virtual void start(const std::vector<Copy>& copies, std::atomic<bool>* done) = 0;
};

}  // namespace expertd::cuda
