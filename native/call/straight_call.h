// One call of a layer that goes straight to servers: through shared memory, or as messages.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lane/client_lane.h"
#include "request/layout.h"
#include "request/message.h"
#include "request/response.h"
#include "request/rules.h"
#include "tokens/number.h"
#include "tokens/rows.h"
#include "tokens/split.h"

namespace expertd {

// A server: how it is reached, and what requests to it say.
struct Owner {
  int64_t number;                                  // by which `Routed::shares` name it
  std::vector<std::shared_ptr<ClientLane>> lanes;  // none: it gets messages
  std::string fingerprint;
  std::optional<uint64_t> epoch;
  uint64_t chunk_tokens;  // of one request at most; at least 1
  uint32_t reply_room;    // bytes
  bool checked = false;   // requests have checksums; then sums in lanes do, too, as those in answers always do
};

// Tokens and where they go; the caller's memory, only used while a call begins.
struct Routed {
  Rows hidden;  // [tokens, width] of `format`; with `scales`, E4M3
  Format format;
  size_t tokens, width, top_k;
  std::span<const int32_t> ids;    // [tokens, top_k]: global experts, -1 for none
  std::span<const float> weights;  // [tokens, top_k]
  Shares shares;                   // by number. Of no experts, all tokens, whatever their ids, go to the only server.
  Rows scales{};                   // [tokens, width / 128] FP32: hidden states are quantised already
};

// What else the requests of a call say.
struct Terms {
  uint32_t layer;
  Dtype hidden, reply;
  uint64_t request_id;                      // of the first part, and those that follow it of the others
  uint64_t timeout_us;                      // 0: none
  std::vector<std::string> traceparents{};  // of requests to each of the owners, or of none
};

enum class PartState {
  kPlanned,
  kPosted,
  kAnswered,  // with what was asked for
  kRefused,   // with anything else: `reply` says what, unless it is empty
  kFull,      // there was no room in the ring
  kEnded,     // the lane, or what a message went through, ended first
};

// What one request asks of one server.
struct CallPart {
  const Owner* owner;
  uint64_t request_id;
  size_t first, rows;                  // of the call's plan
  std::shared_ptr<ClientLane> lane{};  // none: a message
  std::byte* message = nullptr;
  Tensors tensors{};  // of the request, as they are written
  Room room{};
  Room kept{};  // for sums that are to stay in the lane, else without bytes
  uint64_t slot = 0;
  const std::byte* sums = nullptr;  // `sums_bytes`, in the lane's memory or the answer
  PartState state = PartState::kPlanned;
  int64_t begun_ns = 0, spent_ns = 0;
  bool awaited = false;       // in a lane: it was looked at before it was done, so that it is known when that was
  std::string reply{};        // of a lane
  std::string_view answer{};  // the same, or that to a message
  Response response{};
};

// Where sums are added: [tokens, width].
struct Output {
  Format format;
  WritableRows rows;
};

// Sums in a lane's memory, which is given back with this.
class Kept {
 public:
  Kept(std::shared_ptr<ClientLane> lane, Room room) : lane_(std::move(lane)), room_(room) {}
  Kept(Kept&& other) noexcept : lane_(std::move(other.lane_)), room_(std::exchange(other.room_, {})) {}
  Kept& operator=(Kept&&) = delete;
  ~Kept() {
    if (lane_) lane_->give_back(room_);
  }

  std::byte* data() const { return lane_->memory()->base() + room_.at; }
  uint64_t size() const { return room_.bytes; }

 private:
  std::shared_ptr<ClientLane> lane_;
  Room room_;
};

// Memory for a message of so many bytes, which is valid until the call is dropped.
using Allocate = std::function<std::byte*(size_t)>;

// The straight way of a call when nothing is wrong: hidden states are quantised right into the memory of lanes or into
// messages, once each, and partial sums are added right out of it. What goes wrong is said by part, for others to mend.
// One thread at a time, unless said. A call that is dropped before its answers are there cancels those of lanes; their
// memory is free when they have come.
class StraightCall {
 public:
  // Plans, writes and posts; large batches spread over the pool. Messages are written to memory from `allocate`, in the
  // order of their parts, for the caller to send. Nothing where the straight way is none: ids, weights
  // or hidden states that no call can have, an expert without an owner or with one that `owners` lacks, dtypes that
  // need more than quantising, or no room in the lanes. `owners` must outlive the call. With `looped`, the lanes'
  // `poll` names the slots when they are done. With `in_place`, sums that one owner has of all tokens stay in a lane,
  // see `keep`, where they are not FP8 and the lanes keep room for as large a call.
  static std::unique_ptr<StraightCall> begin(std::vector<const Owner*> owners, const Routed& routed, const Terms& terms,
                                             bool looped, bool in_place, const Allocate& allocate);
  ~StraightCall();
  StraightCall(const StraightCall&) = delete;
  StraightCall& operator=(const StraightCall&) = delete;

  // Until all parts are done: kDone, or lost, which counts as done; as `ClientLane::wait`. Meanwhile adds to out
  // [tokens, width] the sums of all parts, in their order: of many rows those that have all of theirs, while others are
  // computed. To be called again, with the same `out`, unless it says kDone; then `summed` says whether out is
  // complete: it is unless a part was not answered. What was altered on its way is found here. In place there is no
  // `out`.
  Wait finish(int64_t deadline_ns, const std::optional<Output>& out);
  bool summed() const { return taken_ == order_.size() && !failed_; }
  bool in_place() const { return in_place_; }
  // Once that is so of a call in place: [tokens, width] of the dtype of replies, its user's from now on.
  Kept keep();
  // Takes what is there, without waiting: whether that is all.
  bool collect();
  // Do not wait for that server any longer: what it has not answered counts as ended. Any thread, while others wait.
  void lose(int64_t number);
  // What came back for the message of a part, whose memory is valid until the call is dropped; with nothing, no answer
  // comes any more. Any thread, while others wait.
  void answer(size_t index, std::string_view response);
  // Ascending servers; of one server, ascending tokens.
  const std::vector<CallPart>& parts() const { return parts_; }
  std::span<const int64_t> tokens_of(const CallPart& part) const { return {&tokens_[part.first], part.rows}; }
  std::span<const int32_t> ids_of(const CallPart& part) const {
    return {&ids_[part.first * routed_.top_k], part.rows * routed_.top_k};
  }
  std::span<const float> weights_of(const CallPart& part) const {
    return {&weights_[part.first * routed_.top_k], part.rows * routed_.top_k};
  }
  size_t tokens() const { return routed_.tokens; }
  size_t width() const { return routed_.width; }
  size_t sums_bytes(const CallPart& part) const { return shape_of(part).sums_bytes(); }

 private:
  StraightCall(std::vector<const Owner*> owners, const Routed& routed, const Terms& terms)
      : owners_(std::move(owners)), routed_(routed), terms_(terms) {}
  bool plan();
  bool plan_whole();
  void cut(const Owner& owner, size_t first, size_t rows);
  bool take_room();
  bool take_room(CallPart& part) const;
  bool take_room_in_place();
  bool take_room_in_place(const std::shared_ptr<ClientLane>& lane);
  bool take_room_in(const std::shared_ptr<ClientLane>& lane, CallPart& part) const;
  Envelope::Places open(CallPart& part, const Allocate& allocate) const;
  bool write_and_post(bool looped, const Allocate& allocate);
  Shape shape_of(const CallPart& part) const;
  Message request(const CallPart& part) const;
  void post(CallPart& part, bool looped) const;
  static bool is_over(const CallPart& part);
  Wait wait_for(size_t index, int64_t deadline_ns);
  bool wait_for_message(size_t index, int64_t deadline_ns);
  void take(CallPart& part);
  void sum(size_t end, const Output& out);
  bool collect_message(size_t index);
  void fetch(CallPart& part) const;
  void accept(CallPart& part) const;
  bool end_if_lost(size_t index);
  bool is_right(const CallPart& part) const;
  bool sums_are_right(const CallPart& part) const;

  const std::vector<const Owner*> owners_;
  Routed routed_;
  const Terms terms_;
  bool in_place_ = false;
  // [rows of all parts]: what each asks for.
  std::unique_ptr<int64_t[]> tokens_;
  std::unique_ptr<int32_t[]> ids_;
  std::unique_ptr<float[]> weights_;
  std::vector<CallPart> parts_;
  std::unique_ptr<std::atomic<bool>[]> lost_;  // [parts]
  std::mutex answering_;
  std::condition_variable answered_;
  std::vector<std::optional<std::pair<std::string_view, int64_t>>> answers_;  // [parts]: to messages, and when
  std::vector<size_t> order_;                                                 // of parts: as they are posted
  size_t taken_ = 0;                                                          // of `order_`: whose sums may be added
  size_t summed_ = 0;                                                         // tokens whose sums are added
  bool failed_ = false;                                                       // whether a part taken was not answered
};

}  // namespace expertd
