// Calls that are written straight to lanes and messages, against servers of this process that follow the real rules:
// whatever is asked of however many servers, sums are those of the pairs, and all memory comes back. Arguments: rounds,
// seed.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <deque>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "call/straight_call.h"
#include "ends.h"
#include "request/reply.h"
#include "request/rules.h"
#include "request/segment.h"
#include "tokens/quantize.h"

using namespace expertd;
using namespace expertd::testing;

namespace {

constexpr size_t kWidth = 256, kExperts = 12, kServers = 3, kOwned = kExperts / kServers;
constexpr uint32_t kCallRoom = 1088;
constexpr uint32_t kMaxTokens = 9;
const Refusal kNotNow{Code::kUnavailable, "not now"};

// A float that BF16 has, and one that has few bits, so that sums of products are exact in any order.
uint16_t bf16_of(float value) { return static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16); }

// Server `number` owns experts kOwned * number to kOwned * (number + 1) - 1, all of which multiply by 1.
class Server {
 public:
  explicit Server(uint32_t number) : number_(number) {
    Placement placement;
    placement.model_fingerprint = "model";
    placement.epoch = 5;
    OwnedLayer owned{.layer = 3, .experts = {}, .experts_text = "some"};
    for (uint32_t i = 0; i < kOwned; ++i) owned.experts.push_back(number * kOwned + i);
    placement.layers = {owned};
    placement.num_routed_experts = kExperts;
    placement.hidden_size = kWidth;
    placement.max_top_k = 4;
    placement.max_tokens = kMaxTokens;
    placement_ = make_placement(std::move(placement));
  }
  ~Server() {
    stopping_ = true;
    if (thread_.joinable()) thread_.join();
  }

  std::shared_ptr<ClientLane> join() {
    auto lane = std::make_shared<ClientLane>(1 << 18, 64);
    const auto [here, there] = socket_pair();
    lane->connect(here);
    std::string reason;
    lane_ = ServerLane::attach(lane->memory(), there, kCallRoom - 64, &reason);
    require(lane_ != nullptr, reason.c_str());
    thread_ = std::thread([this] { serve(); });
    return lane;
  }

  // To a message with its tensors in it.
  std::string answer(std::string_view bytes, bool refuse) const {
    const auto parsed = parse_message(bytes);
    const auto& message = std::get<Message>(parsed);
    if (refuse) return reply_refusal(message.request_id, kNotNow);
    Admitted request = admit(message);
    const Tensors tensors{message.hidden, message.hidden_scales, message.expert_ids, message.weights};
    const auto refusal = check_tensors(message, tensors, &request);
    require(!refusal, refusal ? refusal->text.c_str() : "");
    std::string sums(request.tokens * kWidth * sizeof(float), 0);
    auto* const to = reinterpret_cast<std::byte*>(sums.data());
    compute(request, to);
    return reply_head(request, sums.size()) + sums +
           reply_tail(request, {1e-6, 0, 0, 2e-6, 0}, reply_checksum(request.request_id, to, sums.size()));
  }

 private:
  void serve() {
    std::mt19937 random(number_);
    while (!stopping_) {
      std::array<Posted, 64> posted;
      const size_t count = lane_->take(posted);
      require(lane_->reason().empty(), lane_->reason().c_str());
      for (size_t i = 0; i < count; ++i) {
        if (posted[i].kind == kRequest) waiting_.push_back(posted[i]);
      }
      if (waiting_.empty()) {
        std::this_thread::yield();
        continue;
      }
      // In any order.
      std::swap(waiting_[random() % waiting_.size()], waiting_.back());
      respond(waiting_.back(), random() % 16 == 0);
      waiting_.pop_back();
    }
  }

  void respond(const Posted& posted, bool refuse) {
    std::array<char, kMaxRequestBytes> bytes;
    const auto parsed = parse_message(lane_->message(posted, bytes));
    const auto& message = std::get<Message>(parsed);
    if (refuse) return lane_->answer(posted, reply_refusal(message.request_id, kNotNow));
    Admitted request = admit(message);
    const Segment segment{lane_->memory().base(), lane_->memory().size(), lane_->data(), nullptr, 0};
    std::string copied;
    Placed placed;
    require(!place(message, request, segment, &copied, &placed), "a place that the rules take");
    const auto refusal = check_tensors(message, placed.tensors, &request);
    require(!refusal, refusal ? refusal->text.c_str() : "");
    compute(request, placed.sums);
    lane_->answer(posted, reply_head(request, 0) + reply_tail(request, {1e-6, 0, 0, 2e-6, 0},
                                                              reply_checksum(request.request_id, nullptr, 0)));
  }

  Admitted admit(const Message& message) const {
    auto sizes = check_sizes(message, placement_);
    require(std::holds_alternative<Admitted>(sizes), "sizes that the rules take");
    return std::get<Admitted>(std::move(sizes));
  }

  static void compute(const Admitted& request, std::byte* sums) {
    for (size_t token = 0; token < request.tokens; ++token) {
      float factor = 0;
      for (size_t k = 0; k < request.top_k; ++k) {
        const size_t pair = token * request.top_k + k;
        if (request.local_ids[pair] < 0) continue;
        factor += load<float>(reinterpret_cast<const std::byte*>(request.weights.data()), pair);
      }
      for (size_t i = 0; i < kWidth; ++i) {
        const size_t at = token * kWidth + i;
        const auto stored = load<uint16_t>(reinterpret_cast<const std::byte*>(request.hidden.data()), at);
        store(sums, at, factor * BFloat16::widen(stored));
      }
    }
  }

  const uint32_t number_;
  PlacementPtr placement_;
  std::unique_ptr<ServerLane> lane_;
  std::vector<Posted> waiting_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

// A batch with what is expected of it.
struct Batch {
  size_t tokens, top_k;
  std::vector<uint16_t> hidden;
  std::vector<int32_t> ids;
  std::vector<float> weights, expected;

  explicit Batch(std::mt19937& random)
      : tokens(1 + random() % 40),
        top_k(1 + random() % 4),
        hidden(tokens * kWidth),
        ids(tokens * top_k),
        weights(tokens * top_k),
        expected(tokens * kWidth) {
    for (auto& value : hidden) value = bf16_of(static_cast<float>(random() % 64) - 32);
    // Of some batches one server with a lane has all tokens.
    const bool alone = random() % 3 == 0;
    const auto first = static_cast<int32_t>(alone ? random() % (kServers - 1) * kOwned : 0);
    for (size_t token = 0; token < tokens; ++token) {
      std::vector<int32_t> experts(alone ? kOwned : kExperts);
      for (size_t i = 0; i < experts.size(); ++i) experts[i] = first + static_cast<int32_t>(i);
      std::shuffle(experts.begin(), experts.end(), random);
      float factor = 0;
      for (size_t pair = token * top_k; pair < (token + 1) * top_k; ++pair) {
        const bool wanted = random() % 4 != 0 || (alone && pair % top_k == 0);
        ids[pair] = wanted ? experts[pair % top_k] : -1;
        weights[pair] = ids[pair] < 0 ? 0 : static_cast<float>(random() % 8) / 8;
        factor += weights[pair];
      }
      for (size_t i = 0; i < kWidth; ++i) {
        expected[token * kWidth + i] = factor * BFloat16::widen(hidden[token * kWidth + i]);
      }
    }
  }
};

// The messages of one call, which may be dropped before their answers are there.
struct Sent {
  std::vector<std::string> messages;
  std::mutex dropping;
  StraightCall* call = nullptr;
  std::vector<std::string> answers;
};

// Brings messages to a server and its answers back, on a thread of its own.
class Network {
 public:
  explicit Network(const Server& server) : server_(server), thread_([this] { carry(); }) {}
  ~Network() {
    stopping_ = true;
    thread_.join();
  }

  void send(const std::shared_ptr<Sent>& sent, StraightCall& call) {
    const std::lock_guard lock(mutex_);
    sent->call = &call;
    sent->answers.resize(call.parts().size());
    size_t message = 0;
    for (size_t part = 0; part < call.parts().size(); ++part) {
      if (!call.parts()[part].lane) waiting_.push_back({sent, part, message++});
    }
    require(message == sent->messages.size(), "a message for every part without a lane");
  }

 private:
  struct Carried {
    std::shared_ptr<Sent> sent;
    size_t part, message;
  };

  void carry() {
    std::mt19937 random(7);
    while (!stopping_) {
      std::optional<Carried> next;
      {
        const std::lock_guard lock(mutex_);
        if (!waiting_.empty()) {
          next = std::move(waiting_.front());
          waiting_.pop_front();
        }
      }
      if (!next) {
        std::this_thread::yield();
        continue;
      }
      auto& [sent, part, message] = *next;
      std::string answer = random() % 16 ? server_.answer(sent->messages[message], random() % 16 == 0) : std::string();
      const std::lock_guard lock(sent->dropping);
      sent->answers[part] = std::move(answer);
      if (sent->call) sent->call->answer(part, sent->answers[part]);
    }
  }

  const Server& server_;
  std::mutex mutex_;
  std::deque<Carried> waiting_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

struct UnderWay {
  std::unique_ptr<StraightCall> call;
  Batch batch;
  std::shared_ptr<Sent> sent;

  UnderWay(std::unique_ptr<StraightCall> begun, Batch asked, std::shared_ptr<Sent> with)
      : call(std::move(begun)), batch(std::move(asked)), sent(std::move(with)) {}
  UnderWay(UnderWay&&) = default;
  ~UnderWay() {
    if (!call) return;
    const std::lock_guard lock(sent->dropping);
    sent->call = nullptr;
    call.reset();
  }
};

void check_sums(StraightCall& call, const Batch& batch) {
  std::vector<float> out(batch.tokens * kWidth, NAN);
  const WritableRows rows{reinterpret_cast<std::byte*>(out.data()), kWidth * sizeof(float)};
  const auto output = call.in_place() ? std::nullopt : std::optional(Output{Format::float32, rows});
  require(call.finish(in_ms(20'000), output) == Wait::kDone, "answers in time");
  const bool answered = std::all_of(call.parts().begin(), call.parts().end(),
                                    [](const CallPart& part) { return part.state == PartState::kAnswered; });
  require(call.summed() == answered, "sums exactly when all parts are answered");
  if (answered && call.in_place()) {
    const Kept kept = call.keep();
    require(kept.size() == out.size() * sizeof(float), "a row for every token");
    std::memcpy(out.data(), kept.data(), kept.size());
  }
  if (answered) require(out == batch.expected, "the sums of the pairs");
  for (const CallPart& part : call.parts()) {
    const bool refused = part.state == PartState::kRefused && !part.answer.empty();
    const bool ended = part.state == PartState::kEnded && !part.lane;
    require(part.state == PartState::kAnswered || refused || ended, "an end");
  }
}

}  // namespace

int main(int, char** argv) {
  std::mt19937 random(static_cast<uint32_t>(std::atoi(argv[2])));
  std::vector<std::unique_ptr<Server>> servers;
  std::vector<std::shared_ptr<ClientLane>> lanes;
  std::vector<Owner> owners;
  for (uint32_t number = 0; number < kServers; ++number) {
    servers.push_back(std::make_unique<Server>(number));
    lanes.push_back(servers.back()->join());
    owners.push_back({number, {lanes.back()}, "model", 5, kMaxTokens, kCallRoom});
  }
  std::vector<int64_t> owner(kExperts);
  for (size_t expert = 0; expert < kExperts; ++expert) owner[expert] = static_cast<int64_t>(expert / kOwned);
  // The last one gets messages.
  owners.back().lanes.clear();
  Network network(*servers.back());
  const std::vector<const Owner*> asked{&owners[0], &owners[1], &owners[2]};
  std::vector<uint64_t> free;
  for (const auto& lane : lanes) free.push_back(lane->free_bytes());

  int answered = 0, given_up = 0, crowded = 0, in_place = 0;
  std::vector<UnderWay> under_way;
  for (int round = 0; round < std::atoi(argv[1]); ++round) {
    Batch batch(random);
    const Routed routed{{reinterpret_cast<const std::byte*>(batch.hidden.data()), kWidth * sizeof(uint16_t)},
                        Format::bfloat16,
                        batch.tokens,
                        kWidth,
                        batch.top_k,
                        batch.ids,
                        batch.weights,
                        {owner, kExperts}};
    const Terms terms{3, Dtype::kBFloat16, Dtype::kFloat32, static_cast<uint64_t>(round) * 100 + 1, 1'000'000};
    const bool looped = random() % 2;
    const auto sent = std::make_shared<Sent>();
    sent->messages.reserve(batch.tokens);
    const auto allocate = [&sent](size_t size) {
      return reinterpret_cast<std::byte*>(sent->messages.emplace_back(size, 0).data());
    };
    if (auto call = StraightCall::begin(asked, routed, terms, looped, random() % 2, allocate)) {
      network.send(sent, *call);
      in_place += call->in_place();
      under_way.emplace_back(std::move(call), std::move(batch), sent);
    } else {
      ++crowded;
    }
    while (under_way.size() > random() % 6) {
      const UnderWay next = std::move(under_way.back());
      under_way.pop_back();
      StraightCall* const call = next.call.get();
      if (random() % 3 == 0) {
        ++given_up;
        continue;
      }
      // Awaited by an event loop, or by the thread itself.
      if (random() % 2)
        while (!call->collect()) std::this_thread::yield();
      check_sums(*call, next.batch);
      ++answered;
    }
  }
  under_way.clear();
  for (size_t i = 0; i < lanes.size(); ++i) {
    for (int look = 0; lanes[i]->free_bytes() != free[i]; ++look) {
      require(look < 20'000, "all memory comes back");
      lanes[i]->reap();
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    require(lanes[i]->in_flight() == 0, "nothing is left under way");
  }
  require(answered > 0 && given_up > 0 && in_place > 0, "calls of all kinds");
  std::printf("answered: %d, given up: %d, in place: %d, without room: %d\n", answered, given_up, in_place, crowded);
}
