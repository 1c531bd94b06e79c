// A few threads on which large computations spread, shared by everything in the process.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <type_traits>

#include "base/owned.h"
#include "base/spin.h"

namespace expertd {

class Pool : public Owned {
 public:
  // This process's. A child made by fork, to which no thread came along, gets a new one; the old one is left alone,
  // since its lock may be held for ever.
  static Pool& of_process();
  // One of `size` threads for tests, on a machine of their own; never to be deleted, as its threads do not end.
  Pool(std::size_t size, SpinHost& host) : size_(size), host_(host), ending_(host) {}

  // Threads that compute at once at most, who asks among them: one a usable CPU, but no more than 16.
  std::size_t size() const noexcept { return size_; }
  // Those of them that look for work right now, and begin it within a microsecond. Waking another takes some 10 us, and
  // 50 on virtual machines.
  std::size_t awake() const noexcept { return awake_.load(std::memory_order_relaxed); }
  // From now on threads without work look for it for no longer than this.
  void limit_spin(std::int64_t ns) noexcept;

  // Calls `work(piece)` for every piece from 0 to `pieces` - 1, in any order, here, on threads that are awake and on
  // others as long as there are no more than `wanted` of them, and returns when all are done. `work` must not throw:
  // nobody would catch it on a thread of the pool.
  template <typename Work>
  void run(std::size_t pieces, std::size_t wanted, const Work& work) {
    static_assert(std::is_nothrow_invocable_v<const Work&, std::size_t>);
    const auto call = [](const void* context, std::size_t piece) noexcept {
      (*static_cast<const Work*>(context))(piece);
    };
    Job job{call, &work, pieces, 0, pieces};
    if (pieces > 1 && size_ > 1) return share(job, wanted);
    for (std::size_t piece = 0; piece < pieces; ++piece) work(piece);
  }

  // Has a thread of the pool call `task`, some time. It must not throw.
  void post(std::function<void()> task);

 private:
  struct Job {
    void (*call)(const void* context, std::size_t piece) noexcept;
    const void* context;
    std::size_t pieces;
    std::size_t next;                     // the first piece that nobody took
    std::atomic<std::size_t> unfinished;  // pieces
  };

  void share(Job& job, std::size_t wanted);
  bool start_threads(std::size_t wanted);
  void help() noexcept;
  void wait_for_work(Spin& spin, std::unique_lock<std::mutex>& lock);
  void work_on(Job& job, std::unique_lock<std::mutex>& lock) noexcept;
  bool idle() const { return jobs_.empty() && tasks_.empty(); }

  const std::size_t size_;
  SpinHost& host_;
  std::mutex lock_;
  std::condition_variable posted_;
  std::condition_variable finished_;
  // Those with pieces that nobody took. They live on the stacks of who asks, who waits until none is unfinished.
  std::deque<Job*> jobs_;
  std::deque<std::function<void()>> tasks_;
  std::size_t threads_ = 0;
  std::atomic<std::size_t> awake_{0};
  // Jobs and tasks, for those who look without the lock.
  std::atomic<std::size_t> waiting_{0};
  std::atomic<std::int64_t> most_spin_ns_{Spin::kAutoNs};
  Spin ending_;
};

}  // namespace expertd
