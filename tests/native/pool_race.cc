// Threads that ask a pool whose threads look for work before they sleep: `pool_race ROUNDS`.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "base/pool.h"

namespace expertd {
namespace {

constexpr int kCallers = 3;
constexpr size_t kPieces = 13, kWanted = 3;
constexpr int64_t kPieceNs = 20'000;
int failures = 0;

void expect(bool right, const char* what) {
  if (right) return;
  std::printf("wrong: %s\n", what);
  ++failures;
}

// With CPUs for all who would spin.
class Machine final : public SpinHost {
 public:
  double usable_cpus() override { return 64; }
  int64_t preemptions() override { return 0; }
  int64_t throttles() override { return 0; }
};

// Whether each piece was called once.
bool run(Pool& pool) {
  std::vector<int> called(kPieces);
  pool.run(kPieces, kWanted, [&](size_t piece) noexcept {
    // Long enough that others come in time to help.
    const int64_t until = monotonic_ns() + kPieceNs;
    while (monotonic_ns() < until) pause_cpu();
    ++called[piece];
  });
  return std::all_of(called.begin(), called.end(), [](int times) { return times == 1; });
}

template <typename Condition>
bool soon(const Condition& holds) {
  for (int i = 0; i < 20'000; ++i) {
    if (holds()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

void test_callers_at_once(Pool& pool, int rounds) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < kCallers; ++i)
    callers.emplace_back([&] {
      for (int round = 0; round < rounds; ++round) wrong += !run(pool);
    });
  for (std::thread& caller : callers) caller.join();
  expect(wrong == 0, "every piece is called once");
}

void test_awake_for_a_while(Pool& pool) {
  expect(soon([&] { return run(pool) && pool.awake() > 0; }), "work that comes soon again is waited for awake");
  expect(pool.awake() < pool.size(), "who asks is none of those awake");
  expect(soon([&] { return pool.awake() == 0; }), "without work they sleep");
  expect(run(pool), "asleep they are woken");
}

void test_tasks(Pool& pool, int rounds) {
  std::atomic<int> done{0};
  for (int i = 0; i < rounds; ++i) pool.post([&done] { ++done; });
  expect(soon([&] { return done == rounds; }), "every task is called");
}

void test_limit(Pool& pool, int rounds) {
  pool.limit_spin(1'000'000);
  pool.limit_spin(0);
  pool.limit_spin(2'000'000);
  soon([&] { return pool.awake() == 0; });
  bool awake = false;
  for (int round = 0; round < rounds; ++round) {
    awake |= !run(pool);
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    awake |= pool.awake() > 0;
  }
  expect(!awake, "nobody spins any more");
}

}  // namespace
}  // namespace expertd

int main(int, char** arguments) {
  const int rounds = std::atoi(arguments[1]);
  static expertd::Machine machine;
  auto& pool = *new expertd::Pool(4, machine);
  expertd::test_callers_at_once(pool, rounds);
  expertd::test_awake_for_a_while(pool);
  expertd::test_tasks(pool, rounds);
  expertd::test_limit(pool, rounds);
  std::fflush(stdout);
  std::_Exit(expertd::failures != 0);  // the pool's threads are still there
}
