// One admitted request until its memory is nobody's any more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <string>

#include "request/refusal.h"
#include "request/reply.h"
#include "request/rules.h"

namespace expertd {

struct Lot;
struct Line;
struct Share;

// Requests of one kind can share a device batch.
struct Kind {
  const Placement* placement = nullptr;
  uint32_t layer = 0;
  uint32_t top_k = 0;
  Dtype hidden_dtype = Dtype::kFloat8E4M3FN;
  Dtype sums_dtype = Dtype::kBFloat16;

  bool operator==(const Kind&) const = default;
};

// How the device reaches a request's hidden states and sums: kPinned, by itself; kDevice, they and the scales are in
// its own memory, kPeer: in that of another device, and either way are never read or written here.
enum class Reach : uint8_t { kPageable, kPinned, kDevice, kPeer };
constexpr bool is_on_device(Reach reach) { return reach >= Reach::kDevice; }

// What became of a job.
struct Outcome {
  std::optional<Refusal> refusal = std::nullopt;  // nothing: the answer is complete
  bool told = true;                               // whether this is the answer; else it was given before
  bool over = true;                               // whether nobody uses the job's memory any more
};

// One admitted request until its memory is nobody's any more. The engine's thread owns it while it waits, the executor
// while the device uses it; nobody touches what another owns. Each way in has its own kind of jobs, which knows where
// answers go.
class Job {
 public:
  virtual ~Job() = default;

  // Calls `put_reply`, between the queue and the device; `sums` stay null when there is no memory for the answer.
  virtual void make_room() = 0;
  // Writes what the answer has besides its sums, which are in place.
  virtual void complete() = 0;
  // Whether the first may take long, or wait for Python's lock: then a thread of the pool calls it.
  virtual bool is_slow() const = 0;
  // The same of the second.
  virtual bool is_slow_to_complete() const { return is_slow(); }
  // Tells the caller. On any thread; after an outcome that is over, nothing more comes.
  virtual void settle(Outcome outcome) = 0;
  // Ends its caller's connection; false: who has it must.
  virtual bool disconnect() { return false; }

  Admitted request;
  Reach reach = Reach::kPageable;
  // Where the answer has its sums, which the device puts there, or into memory of the job's if they are to be rounded.
  void put_reply(std::byte* place);
  // Rounds sums that are to be rounded; its memory is free then.
  void round();
  Reach sums_reach() const { return own_sums ? Reach::kPageable : reach; }

  bool own_sums = false;       // whether they are in memory of this process, wherever the reply is
  std::byte* sums = nullptr;   // [tokens, hidden size] of the request's `sums_dtype`
  std::byte* reply = nullptr;  // `reply_bytes` of the request
  std::string identity;        // who calls, as room and turns are shared
  std::string caller;          // the connection
  std::string traceparent;
  uint64_t arrived_ns = 0;  // CLOCK_MONOTONIC, before it was parsed
  uint64_t admitted_ns = 0;
  uint64_t expires_ns = 0;  // 0: never
  StageSeconds seconds;
  std::string appendix;  // what a failpoint adds to a complete answer,
  uint32_t surplus = 0;  // and to the receipt in a lane's slot

  // The engine's.
  std::shared_ptr<Job> self;  // while the engine holds it
  bool cancelled = false;     // by its caller while the device used its tensors
  bool answered = false;      // with an error, before the device was done with them
  bool alone = false;         // when the device was done with it, there was nothing else to do
  bool evicted = false;       // for another identity's
  Job* previous = nullptr;    // in its lot, while it waits
  Job* next = nullptr;
  Lot* lot = nullptr;
  uint64_t number = 0;  // in the order in which its queue's jobs came

  // Among its identity's, from its admission to a batch or a refusal; the admission's.
  std::optional<std::list<std::shared_ptr<Job>>::iterator> room;

  Kind kind() const {
    return {request.placement.get(), request.layer, request.top_k, request.hidden_dtype, request.sums_dtype()};
  }
  uint32_t tokens() const { return request.tokens; }
  // Bytes of its tensors, as admission counts them.
  uint64_t num_bytes() const {
    return request.hidden.size() + request.scales.size() + request.weights.size() + 4 * request.local_ids.size();
  }

 private:
  std::unique_ptr<std::byte[]> computed_;  // the sums that are to be rounded
};

}  // namespace expertd
