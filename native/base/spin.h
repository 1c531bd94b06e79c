// Whether and for how long to spin before sleeping, learnt from the last gaps.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>

namespace expertd {

// Between two looks of a thread that spins.
inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// What threads that wait may know of the machine. Any thread; tests have their own.
class SpinHost {
 public:
  virtual ~SpinHost() = default;
  // CPUs that this process may use: affinity, and quotas of its control groups.
  virtual double usable_cpus() = 0;
  // How often the kernel took the CPU from the calling thread.
  virtual int64_t preemptions() = 0;
  // How often a quota has stopped this process's control group.
  virtual int64_t throttles() = 0;

  // This process's machine.
  static SpinHost& here();

  // Threads of this process that spin now.
  std::atomic<int> spinning{0};
};

// Whether one kind of wait is worth spinning for, learnt from how long the last 16 took: spin as long as twice their
// median and 20 us, if that is at most `max_ns`, and not at all else. Never below 4 CPUs, with a quarter of them
// spinning, for 1 s after that cost the control group its quota, or a while after it cost a thread its CPU: 5 ms, as
// the kernel now and then has something to do everywhere, and twice as long as the last time, up to 1 s, if that is not
// four times as long ago. Any thread; threads may wait at the same time. Times are nanoseconds of the monotonic clock.
class Spin {
 public:
  static constexpr int64_t kAutoNs = 3'000'000;
  // `us` in nanoseconds, or what is spun without an option.
  static constexpr int64_t max_ns(std::optional<int64_t> us) { return us ? *us * 1000 : kAutoNs; }
  explicit Spin(SpinHost& host, int64_t max_ns = kAutoNs) : host_(host), max_ns_(max_ns) {}

  // One wait's spinning, to be handed back to `end`.
  struct Turn {
    int64_t until = 0;  // 0: do not spin
    int64_t preemptions = 0;
  };
  Turn begin(int64_t now);
  // For a wait of which it is known when it ends.
  Turn begin_until(int64_t now, int64_t until);
  void end(const Turn& turn, int64_t now);
  // How long a wait took, spun or slept.
  void learn(int64_t gap_ns);

 private:
  static constexpr size_t kGaps = 16;
  void look(int64_t now);

  SpinHost& host_;
  const int64_t max_ns_;
  // Hints: that threads mix them up costs a wrong guess.
  std::array<std::atomic<int64_t>, kGaps> gaps_{};
  std::atomic<uint32_t> learnt_{0};
  std::atomic<int64_t> budget_ns_{0};
  std::atomic<int64_t> quiet_until_{0}, quiet_ns_{0};
  std::atomic<int64_t> next_look_{0};
  std::atomic<double> cpus_{0};
  std::atomic<int64_t> throttles_{-1};
};

// How a thread waits for work: with some under way longer, perhaps, than with none, so that each kind learns by itself.
// One thread.
class WorkSpin {
 public:
  explicit WorkSpin(SpinHost& host, int64_t max_ns = Spin::kAutoNs) : idle_(host, max_ns), busy_(host, max_ns) {}

  // There is none at `now`: whether to look again at once. `under_way` counts when a wait begins.
  bool goes_on(int64_t now, bool under_way);
  // Although that was said to be long enough, as some is due: whether to look again at once, until `until`.
  bool goes_on_until(int64_t now, int64_t until);
  // There was some.
  void found(int64_t now);

 private:
  void stop(int64_t now);

  Spin idle_, busy_;
  Spin* spin_ = nullptr;  // of this wait; null: there was work at the last look
  int64_t since_ = 0;
  Spin::Turn turn_;
};

}  // namespace expertd
