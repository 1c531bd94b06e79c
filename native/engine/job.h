// One admitted request until its memory is nobody's any more.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "request/reply.h"
#include "request/rules.h"

namespace expertd {

class Inbox;
struct Lot;
struct Share;

// Requests of one kind can share a device batch.
struct Kind {
  const Placement* placement = nullptr;
  uint32_t layer = 0;
  uint32_t top_k = 0;
  Dtype hidden_dtype = Dtype::kFloat8E4M3FN;
  Dtype reply_dtype = Dtype::kBFloat16;

  bool operator==(const Kind&) const = default;
};

// One admitted request until its memory is nobody's any more. The engine's thread owns it while it waits, the executor
// while the device uses it, then its inbox; nobody touches what another owns.
struct Job {
  Admitted request;
  std::string caller;
  uint64_t arrived_ns = 0;  // CLOCK_MONOTONIC, before it was parsed
  uint64_t admitted_ns = 0;
  uint64_t expires_ns = 0;  // 0: never

  // Where the answer goes, and what the inbox has of its own for it.
  std::shared_ptr<Inbox> inbox;
  uint64_t ticket = 0;

  // The engine's.
  std::shared_ptr<Job> self;  // while the engine holds it
  bool cancelled = false;     // by its caller while the device used its tensors
  bool answered = false;      // with an error, before the device was done with them
  Job* previous = nullptr;    // in its lot, while it waits
  Job* next = nullptr;
  Share* share = nullptr;
  Lot* lot = nullptr;

  // The executor's: the answer, as its inbox understands it.
  void* reply = nullptr;
  StageSeconds seconds;

  Kind kind() const {
    return {request.placement.get(), request.layer, request.top_k, request.hidden_dtype, request.reply_dtype};
  }
  uint32_t tokens() const { return request.tokens; }
  // Bytes of its tensors, as admission counts them.
  uint64_t num_bytes() const {
    return request.hidden.size() + request.scales.size() + request.weights.size() + 4 * request.local_ids.size();
  }
};

}  // namespace expertd
