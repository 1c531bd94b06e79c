// A fuzzer of the rings and of what reads requests: callers that write whatever they like, whenever they like, into all
// that they share with a real engine. It lives on and ends their lanes with reasons, while every answer to an honest
// caller beside them is right and in time.
//
// usage: hostile SECONDS SEED
#include <poll.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "engine/callback_executor.h"
#include "engine/engine.h"
#include "hostile_caller.h"

namespace {

using namespace expertd;
using namespace expertd::testing;

constexpr size_t kHonestSize = 1 << 20;
// Generous: sanitizers, and other work on the machine. What hangs takes for ever.
constexpr int64_t kLagMs = 10'000;

// Engine and device --------------------------------------------------------------------------------------------------

PlacementPtr placement() {
  Placement one{.model_fingerprint = "model",
                .epoch = 1,
                .layers = {},
                .layers_text = "1-2",
                .num_routed_experts = kExperts,
                .hidden_size = kWidth,
                .max_top_k = kTopK,
                .max_tokens = kMaxTokens};
  for (const uint32_t layer : {1, 2}) {
    one.layers.push_back({.layer = layer, .experts = {0, 1, 2, 3}, .experts_text = "0-3", .key = layer});
  }
  return make_placement(std::move(one));
}

// What every byte of a sum is.
std::byte summed(std::string_view hidden, size_t at) {
  return static_cast<std::byte>(static_cast<uint8_t>(hidden[at % hidden.size()]) + 1);
}

// A device that computes what can be checked, and checks what it is given.
class Device {
 public:
  explicit Device(Engine& engine) : executor_(std::make_shared<CallbackExecutor>(2)), thread_([this] { run(); }) {
    engine.use(executor_);
  }
  ~Device() {
    executor_->interrupt();
    thread_.join();
  }

 private:
  void run() {
    while (auto batch = executor_->fetch()) {
      batch->pairs.assign(kExperts, 0);
      for (const auto& job : batch->jobs) compute(*job, &batch->pairs);
      executor_->give_back(std::move(batch));
    }
  }

  static void compute(Job& job, std::vector<uint32_t>* pairs) {
    const Admitted& request = job.request;
    require(request.tokens >= 1 && request.tokens <= kMaxTokens && request.top_k <= kTopK, "sizes were checked");
    require(request.local_ids.size() == request.tokens * request.top_k, "every choice has an id");
    for (const int32_t id : request.local_ids) {
      require(id >= -1 && id < static_cast<int32_t>(kExperts), "ids were checked, and not read again");
      if (id >= 0) ++(*pairs)[static_cast<size_t>(id)];
    }
    for (size_t i = 0; i < request.reply_bytes(); i++) job.sums[i] = summed(request.hidden, i);
  }

  const std::shared_ptr<CallbackExecutor> executor_;
  std::thread thread_;
};

// Hands `memory` over; false if it is refused.
bool join(Engine& engine, std::shared_ptr<Mapping> memory, int socket) {
  auto lane = std::make_shared<Lane>();
  std::string reason;
  lane->ring = ServerLane::attach(memory, socket, engine.min_reply_room(), &reason);
  if (!lane->ring) {
    require(!reason.empty(), "a refusal has a reason");
    close(socket);
    return false;
  }
  lane->segment = {.base = memory->base(), .size = memory->size(), .data = lane->ring->data()};
  lane->caller = "caller";
  engine.lanes().add(std::move(lane));
  return true;
}

// Calls --------------------------------------------------------------------------------------------------------------

// The caller whose answers all have to be right.
class Honest {
 public:
  explicit Honest(Engine& engine) : lane_(kHonestSize, kEntryCount) {
    const auto [here, there] = socket_pair();
    lane_.connect(here);
    require(join(engine, lane_.memory(), there), "the honest lane");
  }

  void call(Random& random) {
    const uint32_t tokens = 1 + random() % kMaxTokens;
    const uint64_t number = ++calls_, slot = next_line(lane_.data()), at = slot + 2048;
    const Places places(tokens);
    std::byte* base = lane_.memory()->base() + at;
    std::string hidden(tokens * kWidth, 0);
    for (char& value : hidden) value = static_cast<char>(random());
    std::memcpy(base, hidden.data(), hidden.size());
    std::memset(base + places.scales, 0, places.sums - places.scales);
    std::vector<uint64_t> pairs(kExperts);
    for (uint32_t i = 0; i < tokens * kTopK; i++) {
      const auto id = static_cast<int32_t>((number + i) % kExperts);
      std::memcpy(base + places.ids + 4 * i, &id, sizeof id);
      pairs[static_cast<size_t>(id)]++;
    }
    const int64_t begin = monotonic_ns();
    require(lane_.post(slot, request(number, tokens, at), kRoom, false) == Post::kPosted, "an honest post");
    require(lane_.wait(slot, in_ms(kLagMs)) == Wait::kDone, "an honest call is answered in time");
    took_.push_back(monotonic_ns() - begin);
    check_reply(lane_.reply(slot).value_or(""), number, pairs);
    for (size_t i = 0; i < tokens * kWidth * 2; i++) {
      require(base[places.sums + i] == summed(hidden, i), "the sums are the device's, of what was written");
    }
  }

  std::string summary() {
    std::sort(took_.begin(), took_.end());
    return std::to_string(took_.size()) + " honest calls, p50 " + std::to_string(took_[took_.size() / 2] / 1000) +
           " us, max " + std::to_string(took_.back() / 1000) + " us";
  }

 private:
  static void check_reply(const std::string& reply, uint64_t number, const std::vector<uint64_t>& pairs) {
    FieldReader fields(reply);
    std::vector<uint64_t> receipt(kExperts);
    std::string_view experts;
    uint64_t id = 0;
    while (const auto field = fields.next()) {
      if (field->number == 1) id = field->value;
      if (field->number == 5) experts = field->bytes;
      require(field->number != 2, "an honest call is computed");
      if (field->number != 6) continue;
      require(field->bytes.size() == experts.size(), "a receipt has as many pairs as experts");
      for (size_t i = 0; i < experts.size(); i++) {
        receipt.at(static_cast<size_t>(experts[i])) = static_cast<uint64_t>(field->bytes[i]);
      }
    }
    require(fields.error().empty() && id == number, "the reply is the call's");
    require(receipt == pairs, "the receipt has the pairs that were asked for");
  }

  ClientLane lane_;
  uint64_t calls_ = 0;
  std::vector<int64_t> took_;
};

// Whether the engine, or its owner, has ended a lane's connection.
bool ended(int socket) {
  pollfd look{.fd = socket, .events = POLLRDHUP, .revents = 0};
  return poll(&look, 1, 0) == 1;
}

}  // namespace

int main(int, char** argv) {
  const int64_t end = in_ms(std::atoi(argv[1]) * 1000);
  const auto seed = std::strtoull(argv[2], nullptr, 10);
  std::printf("seed %llu\n", seed);
  std::fflush(stdout);
  Random random(seed);
  auto tally = std::make_shared<Tally>(std::vector<uint32_t>{1, 2}, kExperts, std::vector{1.0}, std::vector{1.0});
  Engine engine(placement(), 64, {.tokens = 100'000, .bytes = 1 << 30}, tally, 0);
  {
    Device device(engine);
    engine.open();
    engine.start();
    Honest honest(engine);
    uint64_t lanes = 0, refused = 0, wrong = 0;
    while (monotonic_ns() < end) {
      const int memfd = hostile_memory(random);
      const auto [here, there] = socket_pair();
      if (!join(engine, std::make_shared<Mapping>(memfd, kSize), there)) {
        refused++;
        close(here);
        close(memfd);
        continue;
      }
      lanes++;
      Hostile hostile(memfd, here, random());
      std::atomic<bool> stop{false};
      std::thread writer([&] { hostile.run(stop); });
      for (uint64_t calls = 20 + random() % 100; calls > 0 && monotonic_ns() < end; calls--) honest.call(random);
      wrong += ended(here);
      stop = true;
      writer.join();
      // Left, it is over, whatever it had under way.
      for (int i = 0; engine.lanes().take_over().empty(); i++) {
        require(i < kLagMs, "a lane that was left is over in time");
        usleep(1000);
        honest.call(random);
      }
      close(memfd);
    }
    const uint64_t computed = tally->outcomes(static_cast<size_t>(Code::kOk)),
                   bad = tally->outcomes(static_cast<size_t>(Code::kInvalidArgument));
    std::printf("%lu hostile lanes, %lu refused, %lu ended with a reason, %lu calls computed, %lu invalid; %s\n", lanes,
                refused, wrong, computed, bad, honest.summary().c_str());
    require(wrong && bad, "something happened");
  }
  engine.stop();
}
