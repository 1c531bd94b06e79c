// Threads that count while others read: `tally_race COUNT`. Then what one answer's counting costs, in nanoseconds.

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "engine/sampler.h"
#include "engine/tally.h"

namespace expertd {
namespace {

constexpr uint32_t kExperts = 256, kTopK = 8;
constexpr int kThreads = 4;
int failures = 0;

void expect(bool right, const char* what) {
  if (right) return;
  std::printf("wrong: %s\n", what);
  ++failures;
}

class Answered final : public Job {
 public:
  Answered() {
    Placement placement;
    for (const uint32_t layer : {1, 2, 3}) {
      placement.layers.push_back({.layer = layer});
      for (uint32_t expert = 0; expert < kExperts; ++expert) placement.layers.back().experts.push_back(expert);
    }
    placement.num_routed_experts = kExperts;
    placement.hidden_size = 128;
    request.placement = make_placement(std::move(placement));
    request.owned = request.placement->find(2);
    request.layer = 2;
    request.tokens = 1;
    request.pairs.resize(kExperts);
    for (uint32_t i = 0; i < kTopK; ++i) request.pairs[i * 31] = 1;
    caller = "unix:/somewhere";
    traceparent = "a span";
    seconds = {.decode = 1e-5, .queue = 2e-5, .copy_in = 3e-6, .compute = 5e-5, .copy_out = 4e-6};
  }
  void make_room() override {}
  void complete() override {}
  bool is_slow() const override { return false; }
  void settle(Outcome) override {}
};

Tally make_tally() {
  std::vector<double> bounds;
  for (double bound = 1e-5; bound < 10; bound *= 2.3) bounds.push_back(bound);
  return Tally({1, 2, 3}, kExperts, bounds, {1, 4, 16});
}

void race(uint64_t count) {
  Tally tally = make_tally();
  tally.tell_of(false, true);
  Histogram shared({1.0});
  std::atomic<bool> done{false};
  uint64_t told = 0;
  const auto take = [&] {
    uint64_t dropped = 0;
    told += tally.take_told(&dropped).size() + dropped;
  };
  std::thread reader([&] {
    while (!done) {
      uint64_t before = tally.outcomes(0);
      take();
      for (const auto& answer : tally.answers()) expect(answer.tokens == 1 && answer.seconds[3] == 5e-5, "a record");
      for (const auto& refusal : tally.refusals()) expect(refusal.text == "not now", "a refusal");
      expect(tally.outcomes(0) >= before && tally.expert_pairs().size() == 3 * kExperts, "a look back");
    }
  });
  std::vector<std::thread> writers;
  for (int i = 0; i < kThreads; ++i) {
    writers.emplace_back([&] {
      Answered job;
      for (uint64_t n = 0; n < count; ++n) {
        tally.began();
        tally.answered(job, 1e-6);
        // Without a lock in between, which would keep threads apart.
        for (int i = 0; i < 10; ++i) shared.observe(0.5);
        tally.turned_away({Code::kResourceExhausted, "not now"}, 1, 2, "a stranger", "somebody", "", monotonic_ns());
      }
    });
  }
  for (auto& writer : writers) writer.join();
  done = true;
  reader.join();
  take();
  const uint64_t all = kThreads * count;
  expect(tally.outcomes(0) == all && tally.outcomes(8) == all, "outcomes");
  expect(tally.tokens() == all && tally.pairs() == kTopK * all && tally.in_flight() == 0, "sums");
  expect(tally.expert_pairs()[kExperts + 31] == all && tally.expert_pairs()[kExperts + 1] == 0, "pairs");
  expect(told == all, "what was told");
  for (const Histogram& stage : tally.stages()) {
    uint64_t sum = 0;
    for (const uint64_t bucket : stage.counts()) sum += bucket;
    expect(sum == all, "a histogram");
  }
  expect(shared.counts()[0] == 10 * all && shared.sum() == 5.0 * static_cast<double>(all), "what all observe");
  const double computed = tally.stages()[3].sum(), expected = 5e-5 * static_cast<double>(all);
  expect(computed > 0.999999 * expected && computed < 1.000001 * expected, "a sum of seconds");
}

void sample(uint64_t count) {
  Sampler sampler(0.5, 3);
  std::vector<std::byte> sums(4 * 512, std::byte{9});
  uint64_t taken = 0;
  std::thread reader([&] {
    while (const auto sample = sampler.take()) {
      ++taken;
      expect(sample->sums == std::string(512, 9), "a sample");
    }
  });
  Answered job;
  job.request.tokens = 4;
  job.request.reply_dtype = Dtype::kFloat32;
  job.request.top_k = 2;
  job.request.local_ids.resize(8);
  job.sums = sums.data();
  for (uint64_t n = 0; n < count; ++n) sampler.offer(job);
  job.reach = Reach::kDevice;
  job.sums = nullptr;
  for (uint64_t n = 0; n < count; ++n) sampler.offer(job);
  sampler.interrupt();
  reader.join();
  const double share = static_cast<double>(taken + sampler.dropped()) / static_cast<double>(count);
  expect(share > 0.4 && share < 0.6, "the share of samples");
}

void measure(uint64_t count) {
  Tally tally = make_tally();
  Answered job;
  const int64_t begin = monotonic_ns();
  for (uint64_t n = 0; n < count; ++n) {
    tally.began();
    tally.answered(job, 1e-6);
  }
  std::printf("%.0f ns an answer\n", static_cast<double>(monotonic_ns() - begin) / static_cast<double>(count));
}

}  // namespace
}  // namespace expertd

int main(int, char** arguments) {
  const uint64_t count = std::strtoull(arguments[1], nullptr, 10);
  expertd::race(count);
  expertd::sample(count);
  expertd::measure(count);
  return expertd::failures != 0;
}
