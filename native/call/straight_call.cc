#include "call/straight_call.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "base/clock.h"
#include "request/checksums.h"
#include "request/layout.h"
#include "tokens/finite.h"
#include "tokens/quantize.h"
#include "tokens/stream.h"
#include "tokens/sum.h"

namespace expertd {
namespace {

constexpr uint64_t kRequestRoom = 512;  // of a slot: a request without tensors, whose fingerprint is 64 bytes

// Where a token's hidden state goes.
struct Target {
  std::byte* hidden;
  std::byte* scales;
};

std::optional<Format> format_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return Format::bfloat16;
    case Dtype::kFloat32:
      return Format::float32;
    case Dtype::kFloat8E4M3FN:
      return Format::float8;
  }
  return std::nullopt;
}

// Whether a row of ids is one: within bounds, and no expert twice.
bool is_choice(std::span<const int32_t> row, size_t experts) {
  for (size_t i = 0; i < row.size(); ++i) {
    if (row[i] < -1 || row[i] >= static_cast<int64_t>(experts)) return false;
    const auto before = row.first(i);
    if (row[i] >= 0 && std::find(before.begin(), before.end(), row[i]) != before.end()) return false;
  }
  return true;
}

// What an answer that came at an unknown time has taken at least: what its server says, if that can be.
int64_t spent_by_server(const CallPart& part) {
  const StageSeconds& spent = part.response.seconds;
  const double said = (spent.decode + spent.queue + spent.copy_in + spent.compute + spent.copy_out) * 1e9;
  return static_cast<int64_t>(std::min(static_cast<double>(part.spent_ns), std::max(0.0, said)));
}

bool are_choices(const Routed& routed) {
  for (size_t token = 0; token < routed.tokens; ++token) {
    if (!is_choice(routed.ids.subspan(token * routed.top_k, routed.top_k), routed.shares.experts)) return false;
  }
  return std::all_of(routed.weights.begin(), routed.weights.end(), [](float weight) { return std::isfinite(weight); });
}

}  // namespace

std::unique_ptr<StraightCall> StraightCall::begin(std::vector<const Owner*> owners, const Routed& routed,
                                                  const Terms& terms, bool looped, bool in_place,
                                                  const Allocate& allocate) {
  const bool writable = terms.hidden == Dtype::kFloat8E4M3FN || format_of(terms.hidden) == routed.format;
  const bool has_blocks = terms.hidden == Dtype::kFloat8E4M3FN || terms.reply == Dtype::kFloat8E4M3FN;
  if (!writable || (has_blocks && routed.width % QUANTIZATION_BLOCK != 0) || !format_of(terms.reply) ||
      !(routed.shares.experts == 0 || are_choices(routed)))
    return nullptr;
  std::unique_ptr<StraightCall> call(new StraightCall(std::move(owners), routed, terms));
  if (!call->plan() || !((in_place && call->take_room_in_place()) || call->take_room())) return nullptr;
  call->lost_ = std::make_unique<std::atomic<bool>[]>(call->parts_.size());
  call->answers_.resize(call->parts_.size());
  if (!call->write_and_post(looped, allocate)) return nullptr;
  call->routed_.hidden = call->routed_.scales = {};
  call->routed_.ids = {};
  call->routed_.weights = {};
  call->routed_.shares = {};
  return call;
}

StraightCall::~StraightCall() {
  for (const CallPart& part : parts_) {
    if (!part.lane) continue;
    if (part.state == PartState::kPosted) {
      part.lane->abandon(part.slot, {part.room, part.kept});
    } else {
      part.lane->give_back(part.room);
      part.lane->give_back(part.kept);
    }
  }
}

bool StraightCall::plan() {
  const size_t pairs = routed_.ids.size();
  if (routed_.shares.experts == 0) return plan_whole();
  tokens_ = std::make_unique_for_overwrite<int64_t[]>(pairs);
  ids_ = std::make_unique_for_overwrite<int32_t[]>(pairs * routed_.top_k);
  weights_ = std::make_unique_for_overwrite<float[]>(pairs * routed_.top_k);
  std::vector<int32_t> orphans;
  const auto planned = split({routed_.ids, routed_.weights, routed_.top_k}, routed_.shares,
                             {tokens_.get(), ids_.get(), weights_.get()}, orphans);
  size_t first = 0;
  for (const auto& [number, rows] : planned) {
    const auto owner = std::find_if(owners_.begin(), owners_.end(),
                                    [number = number](const Owner* one) { return one->number == number; });
    if (owner == owners_.end()) return false;
    cut(**owner, first, rows);
    first += rows;
  }
  return orphans.empty();
}

// Requests of an owner for `rows` of the plan.
void StraightCall::cut(const Owner& owner, size_t first, size_t rows) {
  const size_t pieces = (rows + owner.chunk_tokens - 1) / owner.chunk_tokens;
  for (size_t piece = 0; piece < pieces; ++piece) {
    const size_t count = rows / pieces + (piece < rows % pieces);
    parts_.push_back({.owner = &owner, .request_id = terms_.request_id + parts_.size(), .first = first, .rows = count});
    first += count;
  }
}

bool StraightCall::plan_whole() {
  if (owners_.size() != 1) return false;
  tokens_ = std::make_unique_for_overwrite<int64_t[]>(routed_.tokens);
  std::iota(tokens_.get(), tokens_.get() + routed_.tokens, 0);
  ids_ = std::make_unique_for_overwrite<int32_t[]>(routed_.ids.size());
  weights_ = std::make_unique_for_overwrite<float[]>(routed_.ids.size());
  std::copy(routed_.ids.begin(), routed_.ids.end(), ids_.get());
  std::copy(routed_.weights.begin(), routed_.weights.end(), weights_.get());
  cut(*owners_[0], 0, routed_.tokens);
  return true;
}

bool StraightCall::take_room() {
  return std::all_of(parts_.begin(), parts_.end(),
                     [this](CallPart& part) { return part.owner->lanes.empty() || take_room(part); });
}

bool StraightCall::take_room(CallPart& part) const {
  return std::ranges::any_of(part.owner->lanes, [&](const auto& lane) { return take_room_in(lane, part); });
}

bool StraightCall::take_room_in_place() {
  if (parts_.empty()) return false;
  const auto only = [this](const CallPart& part) { return part.owner == parts_.front().owner; };
  const size_t rows = std::accumulate(parts_.begin(), parts_.end(), size_t{0},
                                      [](size_t sum, const CallPart& part) { return sum + part.rows; });
  if (rows != routed_.tokens || !std::ranges::all_of(parts_, only) || terms_.reply == Dtype::kFloat8E4M3FN ||
      expertd::sums_bytes(terms_.reply, 1, routed_.width) % kLine != 0) {
    return false;
  }
  in_place_ = std::ranges::any_of(parts_.front().owner->lanes,
                                  [this](const auto& lane) { return !lane->ended() && take_room_in_place(lane); });
  return in_place_;
}

// Sums of all parts one after another, whose rows are whole lines.
bool StraightCall::take_room_in_place(const std::shared_ptr<ClientLane>& lane) {
  const uint64_t row_bytes = expertd::sums_bytes(terms_.reply, 1, routed_.width);
  uint64_t bytes = routed_.tokens * row_bytes, left = 0;
  const auto taken = lane->take(bytes);
  if (!taken) return false;
  for (CallPart& part : parts_) part.kept = {*taken + part.first * row_bytes, part.rows * row_bytes};
  const bool all = std::ranges::all_of(parts_, [&](CallPart& part) { return take_room_in(lane, part); });
  for (const CallPart& part : parts_) bytes += part.room.bytes;
  for (const auto& one : parts_.front().owner->lanes) left += one->ended() ? 0 : one->free_bytes();
  // Who keeps all results still shares memory.
  if (all && left >= bytes) return true;
  for (CallPart& part : parts_) {
    lane->give_back(std::exchange(part.room, {}));
    lane->give_back(std::exchange(part.kept, {}));
    part.lane = nullptr;
  }
  return false;
}

bool StraightCall::take_room_in(const std::shared_ptr<ClientLane>& lane, CallPart& part) const {
  const auto sums = part.kept.bytes ? std::optional(part.kept.at) : std::nullopt;
  const Layout at = lay_out(0, std::nullopt, shape_of(part), sums);
  const uint64_t slot = next_line(static_cast<uint64_t>(at.host_end));
  const uint64_t bytes = slot + kLine + kRequestRoom + part.owner->reply_room;
  const auto taken = lane->ended() ? std::nullopt : lane->take(bytes);
  if (!taken) return false;
  part.lane = lane;
  part.room = {*taken, bytes};
  part.slot = *taken + slot;
  part.sums = lane->memory()->base() + (sums ? 0 : *taken) + static_cast<uint64_t>(at.sums);
  return true;
}

// Where its tensors go.
Envelope::Places StraightCall::open(CallPart& part, const Allocate& allocate) const {
  const Shape shape = shape_of(part);
  Envelope::Places places{};
  if (part.lane) {
    const Layout at = lay_out(part.room.at, std::nullopt, shape);
    std::byte* const base = part.lane->memory()->base();
    const auto place = [base](auto offset) { return base + static_cast<uint64_t>(offset); };
    places = {place(at.hidden), place(at.scales), place(at.ids), place(at.weights)};
  } else {
    const Envelope envelope(request(part), shape.hidden_bytes(), shape.scales_bytes(), shape.choice_bytes(),
                            shape.choice_bytes());
    part.message = allocate(envelope.size());
    places = envelope.write(part.message);
  }
  const auto view = [](const std::byte* at, uint64_t bytes) {
    return std::string_view(reinterpret_cast<const char*>(at), bytes);
  };
  part.tensors = {view(places.hidden, shape.hidden_bytes()), view(places.scales, shape.scales_bytes()),
                  view(places.ids, shape.choice_bytes()), view(places.weights, shape.choice_bytes())};
  return places;
}

// False, with some parts posted, where a hidden state is not finite.
bool StraightCall::write_and_post(bool looped, const Allocate& allocate) {
  std::vector<size_t> begins(routed_.tokens + 1);
  for (const CallPart& part : parts_) {
    for (const int64_t token : tokens_of(part)) ++begins[static_cast<size_t>(token) + 1];
  }
  for (size_t token = 0; token < routed_.tokens; ++token) begins[token + 1] += begins[token];
  std::vector<Target> targets(begins.back());
  std::vector<size_t> next(begins.begin(), begins.end() - 1);
  for (CallPart& part : parts_) {
    const Shape shape = shape_of(part);
    auto [hidden, scales, ids, weights] = open(part, allocate);
    std::memcpy(ids, ids_of(part).data(), shape.choice_bytes());
    std::memcpy(weights, weights_of(part).data(), shape.choice_bytes());
    for (const int64_t token : tokens_of(part)) {
      targets[next[static_cast<size_t>(token)]++] = {hidden, scales};
      hidden += shape.hidden_bytes() / part.rows;
      scales += shape.scales_bytes() / part.rows;
    }
  }

  const size_t hidden_bytes = routed_.width * size_of(terms_.hidden);
  const size_t scales_bytes = routed_.width / QUANTIZATION_BLOCK * sizeof(float);
  const bool copied = routed_.scales.data || terms_.hidden != Dtype::kFloat8E4M3FN;
  const bool past_caches = copied && routed_.tokens * hidden_bytes >= STREAMED_BYTES;
  // Whether it is finite, as far as it is not quantised already.
  const auto write = [&](size_t token) {
    const std::span<const Target> mine(&targets[begins[token]], begins[token + 1] - begins[token]);
    if (mine.empty()) return true;
    const Rows row{routed_.hidden[token], 0};
    if (copied) {
      for (const Target& target : mine) {
        past_caches ? stream(target.hidden, row.data, hidden_bytes)
                    : static_cast<void>(std::memcpy(target.hidden, row.data, hidden_bytes));
        if (routed_.scales.data) std::memcpy(target.scales, routed_.scales[token], scales_bytes);
      }
      return routed_.scales.data || all_finite(row.data, routed_.format, routed_.width);
    }
    const bool finite = quantize(row, routed_.format, 1, routed_.width, {mine[0].hidden, 0}, {mine[0].scales, 0});
    for (const Target& target : mine.subspan(1)) {
      std::memcpy(target.hidden, mine[0].hidden, hidden_bytes);
      std::memcpy(target.scales, mine[0].scales, scales_bytes);
    }
    return finite;
  };

  // A part is posted as soon as its last token is written, so that servers begin while others' tokens are.
  order_.resize(parts_.size());
  std::iota(order_.begin(), order_.end(), 0);
  const auto end_of = [this](size_t index) { return static_cast<size_t>(tokens_of(parts_[index]).back()) + 1; };
  std::stable_sort(order_.begin(), order_.end(), [&](size_t one, size_t other) { return end_of(one) < end_of(other); });
  // A core copies several times what it quantises.
  const size_t work = copied ? hidden_bytes / 4 : routed_.width * size_of(routed_.format);
  size_t written = 0;
  std::atomic<bool> finite{true};
  for (const size_t index : order_) {
    const size_t end = end_of(index);
    spread(end - written, work, [&](size_t from, size_t to) noexcept {
      for (size_t token = written + from; token < written + to; ++token)
        if (!write(token)) finite.store(false, std::memory_order_relaxed);
      if (past_caches) end_streams();
    });
    if (!finite.load(std::memory_order_relaxed)) return false;
    written = std::max(written, end);
    post(parts_[index], looped);
  }
  return true;
}

Shape StraightCall::shape_of(const CallPart& part) const {
  return {part.rows, routed_.width, routed_.top_k, terms_.hidden, terms_.reply};
}

Message StraightCall::request(const CallPart& part) const {
  const auto owner = static_cast<size_t>(std::find(owners_.begin(), owners_.end(), part.owner) - owners_.begin());
  return {.request_id = part.request_id,
          .model_fingerprint = part.owner->fingerprint,
          .placement_epoch = part.owner->epoch,
          .layer = terms_.layer,
          .num_tokens = part.rows,
          .top_k = routed_.top_k,
          .hidden_dtype = static_cast<uint64_t>(terms_.hidden),
          .reply_dtype = static_cast<uint64_t>(terms_.reply),
          .hidden = {},
          .hidden_scales = {},
          .expert_ids = {},
          .weights = {},
          .timeout_us = terms_.timeout_us,
          .segment_offset = part.lane ? std::optional(part.room.at) : std::nullopt,
          .cancels = std::nullopt,
          .gpu_offset = std::nullopt,
          .sums_offset = part.kept.bytes ? std::optional(part.kept.at) : std::nullopt,
          .traceparent = terms_.traceparents.empty() ? std::string_view() : terms_.traceparents[owner],
          // Their length is all that counts before the tensors are written.
          .fields_checksum = part.owner->checked ? std::optional(0u) : std::nullopt,
          .tensors_checksum = part.owner->checked ? std::optional(0u) : std::nullopt};
}

void StraightCall::post(CallPart& part, bool looped) const {
  Message message = request(part);
  if (part.owner->checked) {
    message.tensors_checksum = tensors_checksum(part.tensors);
    message.fields_checksum = fields_checksum(message);
  }
  const std::string head = write_message(message);
  part.state = PartState::kPosted;
  part.begun_ns = monotonic_ns();
  if (!part.lane) {
    std::memcpy(part.message, head.data(), head.size());
    return;
  }
  const Post posted =
      head.size() > kRequestRoom ? Post::kFull : part.lane->post(part.slot, head, part.owner->reply_room, looped);
  if (posted != Post::kPosted) part.state = posted == Post::kFull ? PartState::kFull : PartState::kEnded;
}

Wait StraightCall::finish(int64_t deadline_ns, const std::optional<Output>& out) {
  while (taken_ < order_.size()) {
    CallPart& part = parts_[order_[taken_]];
    if (part.state == PartState::kPosted) {
      const Wait how = wait_for(order_[taken_], deadline_ns);
      if (how != Wait::kDone) return how;
    }
    take(part);
    ++taken_;
    if (!out || failed_ || taken_ == order_.size() || is_over(parts_[order_[taken_]])) continue;
    size_t end = routed_.tokens;
    for (size_t i = taken_; i < order_.size(); ++i) {
      end = std::min(end, static_cast<size_t>(tokens_of(parts_[order_[i]]).front()));
    }
    if (end > summed_ && (end - summed_) * routed_.width * size_of(out->format) >= PIECE_BYTES) sum(end, *out);
  }
  if (out && !failed_) sum(routed_.tokens, *out);
  return Wait::kDone;
}

Kept StraightCall::keep() {
  const CallPart& first = parts_.front();
  Room room{first.kept.at, 0};
  for (CallPart& part : parts_) room.bytes += std::exchange(part.kept, {}).bytes;
  return {first.lane, room};
}

// Whether nothing has to be waited for: then sums are added in one go, which is faster than in pieces.
bool StraightCall::is_over(const CallPart& part) {
  return part.state != PartState::kPosted || (part.lane && part.lane->done(part.slot));
}

// Until it is done, or lost.
Wait StraightCall::wait_for(size_t index, int64_t deadline_ns) {
  CallPart& part = parts_[index];
  if (end_if_lost(index)) return Wait::kDone;
  if (!part.lane) return wait_for_message(index, deadline_ns) ? Wait::kDone : Wait::kExpired;
  part.awaited |= !part.lane->done(part.slot);
  const Wait how = part.lane->wait(part.slot, deadline_ns);
  if (how == Wait::kDone) {
    fetch(part);
  } else if (how == Wait::kEnded) {
    part.state = PartState::kEnded;
  } else {
    return how;
  }
  return Wait::kDone;
}

bool StraightCall::collect() {
  bool all = true;
  for (size_t index = 0; index < parts_.size(); ++index) {
    CallPart& part = parts_[index];
    if (part.state != PartState::kPosted || end_if_lost(index)) continue;
    if (!part.lane) {
      all &= collect_message(index);
      continue;
    }
    // The end first: what is done by then is done.
    const bool ended = part.lane->ended();
    if (part.lane->done(part.slot)) {
      fetch(part);
    } else if (ended) {
      part.state = PartState::kEnded;
    } else {
      part.awaited = true;
      all = false;
    }
  }
  return all;
}

void StraightCall::lose(int64_t number) {
  for (size_t index = 0; index < parts_.size(); ++index) {
    if (parts_[index].owner->number == number) lost_[index].store(true, std::memory_order_relaxed);
  }
  const std::lock_guard lock(answering_);
  answered_.notify_all();
}

void StraightCall::answer(size_t index, std::string_view response) {
  const std::lock_guard lock(answering_);
  answers_[index] = {response, monotonic_ns()};
  answered_.notify_all();
}

bool StraightCall::wait_for_message(size_t index, int64_t deadline_ns) {
  const auto over = [this, index] { return answers_[index] || lost_[index].load(std::memory_order_relaxed); };
  std::unique_lock lock(answering_);
  if (!answered_.wait_for(lock, std::chrono::nanoseconds(deadline_ns - monotonic_ns()), over)) return false;
  lock.unlock();
  return collect_message(index);
}

// Whether it is done.
bool StraightCall::collect_message(size_t index) {
  CallPart& part = parts_[index];
  if (end_if_lost(index)) return true;
  {
    const std::lock_guard lock(answering_);
    if (!answers_[index]) return false;
    part.answer = answers_[index]->first;
    part.spent_ns = answers_[index]->second - part.begun_ns;
  }
  part.state = part.answer.empty() ? PartState::kEnded : PartState::kRefused;
  if (!part.answer.empty()) accept(part);
  return true;
}

bool StraightCall::end_if_lost(size_t index) {
  if (!lost_[index].load(std::memory_order_relaxed)) return false;
  CallPart& part = parts_[index];
  if (part.lane) part.lane->abandon(part.slot, {part.room, part.kept});
  part.room = part.kept = {};
  part.state = PartState::kEnded;
  return true;
}

void StraightCall::fetch(CallPart& part) const {
  part.spent_ns = monotonic_ns() - part.begun_ns;
  part.state = PartState::kRefused;
  auto reply = part.lane->reply(part.slot);
  if (!reply) return;
  part.reply = *std::move(reply);
  part.answer = part.reply;
  accept(part);
  if (!part.awaited && part.state == PartState::kAnswered) part.spent_ns = spent_by_server(part);
}

// Reads the answer of a part, and looks whether it is what was asked for.
void StraightCall::accept(CallPart& part) const {
  auto response = read_response(part.answer);
  if (!response) return;
  part.response = *std::move(response);
  const std::string_view sums = part.response.sums;
  if (sums.size() != (part.lane ? 0 : sums_bytes(part))) return;
  if (!part.lane) part.sums = reinterpret_cast<const std::byte*>(sums.data());
  if (is_right(part)) part.state = PartState::kAnswered;
}

// Whether every pair was computed once, and the sums are what was asked for.
bool StraightCall::is_right(const CallPart& part) const {
  const Response& response = part.response;
  const bool without_sums = part.lane && !part.owner->checked;
  if (response.request_id != part.request_id || response.reply_dtype != static_cast<uint64_t>(terms_.reply) ||
      (without_sums && response.checksum != reply_checksum(response.request_id, nullptr, 0))) {
    return false;
  }
  auto expected = count_pairs(ids_of(part));
  for (const auto& [expert, pairs] : response.receipt) {
    if (pairs == 0 || expert >= expected.size() || static_cast<uint64_t>(expected[expert]) != pairs) return false;
    expected[expert] = 0;  // so that a second mention is wrong
  }
  return std::all_of(expected.begin(), expected.end(), [](int64_t pairs) { return pairs == 0; });
}

bool StraightCall::sums_are_right(const CallPart& part) const {
  if (part.lane && !part.owner->checked) return true;
  return part.response.checksum == reply_checksum(part.request_id, part.sums, sums_bytes(part));
}

void StraightCall::take(CallPart& part) {
  if (part.state == PartState::kAnswered && !sums_are_right(part)) part.state = PartState::kRefused;
  failed_ |= part.state != PartState::kAnswered;
}

// Adds what all parts have for tokens from `summed_` to `end`.
void StraightCall::sum(size_t end, const Output& out) {
  const Format stored = *format_of(terms_.reply);
  std::vector<Part> sums;
  for (const CallPart& part : parts_) {
    const auto tokens = tokens_of(part);
    const auto at = [&](size_t token) {
      return static_cast<size_t>(std::lower_bound(tokens.begin(), tokens.end(), static_cast<int64_t>(token)) -
                                 tokens.begin());
    };
    const size_t first = at(summed_), count = at(end) - first;
    const ptrdiff_t values = static_cast<ptrdiff_t>(values_bytes(terms_.reply, 1, routed_.width));
    Part& added = sums.emplace_back(
        Part{{part.sums + first * static_cast<size_t>(values), values}, stored, count, tokens.data() + first, nullptr});
    if (stored != Format::float8) continue;
    const ptrdiff_t scales = static_cast<ptrdiff_t>(scales_bytes(terms_.reply, 1, routed_.width));
    added.scales = {
        part.sums + values_bytes(terms_.reply, part.rows, routed_.width) + first * static_cast<size_t>(scales), scales};
  }
  expertd::sum(sums, end - summed_, routed_.width, out.format, {out.rows[summed_], out.rows.stride},
               static_cast<int64_t>(summed_));
  summed_ = end;
}

}  // namespace expertd
