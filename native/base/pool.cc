#include "base/pool.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/cpus.h"

namespace expertd {
namespace {

constexpr std::size_t MOST_THREADS = 16;
// How long who asked spins for the last pieces of others before it sleeps.
constexpr std::int64_t ENDING_NS = 100'000;

std::atomic<Pool*> current{nullptr};

}  // namespace

Pool& Pool::of_process() {
  Pool* pool = current.load(std::memory_order_acquire);
  if (pool && pool->here()) return *pool;
  // Never deleted once it is the current one: its threads may outlive every static object.
  auto* fresh = new Pool(std::min(MOST_THREADS, usable_cpus()), SpinHost::here());
  if (current.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;  // another thread was faster
  return *pool;
}

void Pool::limit_spin(std::int64_t ns) noexcept {
  std::int64_t most = most_spin_ns_.load();
  while (ns < most && !most_spin_ns_.compare_exchange_weak(most, ns)) {
  }
}

void Pool::share(Job& job, std::size_t wanted) {
  const std::size_t others = std::min({job.pieces - 1, size_ - 1, wanted});
  std::unique_lock lock(lock_);
  start_threads(others);
  jobs_.push_back(&job);
  waiting_.fetch_add(1, std::memory_order_relaxed);
  lock.unlock();
  // Without the lock: waking takes long, and threads that look for work would sleep for the lock meanwhile.
  for (std::size_t woken = awake(); woken < others; ++woken) posted_.notify_one();
  lock.lock();
  while (job.next < job.pieces) work_on(job, lock);
  if (job.unfinished.load(std::memory_order_acquire) == 0) return;
  lock.unlock();
  const std::int64_t now = monotonic_ns();
  const Spin::Turn turn = ending_.begin_until(now, now + std::min(ENDING_NS, most_spin_ns_.load()));
  while (job.unfinished.load(std::memory_order_acquire) && monotonic_ns() < turn.until) pause_cpu();
  ending_.end(turn, monotonic_ns());
  lock.lock();
  finished_.wait(lock, [&] { return job.unfinished.load(std::memory_order_acquire) == 0; });
}

void Pool::post(std::function<void()> task) {
  std::unique_lock lock(lock_);
  if (!start_threads(size_)) {
    lock.unlock();
    return task();
  }
  tasks_.push_back(std::move(task));
  waiting_.fetch_add(1, std::memory_order_relaxed);
  lock.unlock();
  posted_.notify_one();
}

// Whether there is any.
bool Pool::start_threads(std::size_t wanted) {
  try {
    for (; threads_ < wanted; ++threads_) std::thread(&Pool::help, this).detach();
  } catch (const std::system_error&) {
    // No more threads for this process: those that there are do it, if need be the one that asks alone.
  }
  return threads_ > 0;
}

void Pool::help() noexcept {
  Spin spin(host_);
  std::unique_lock lock(lock_);
  for (;;) {
    if (idle()) wait_for_work(spin, lock);
    if (!jobs_.empty()) {
      work_on(*jobs_.front(), lock);
      continue;
    }
    auto task = std::move(tasks_.front());
    tasks_.pop_front();
    waiting_.fetch_sub(1, std::memory_order_relaxed);
    lock.unlock();
    task();
    task = nullptr;  // what it holds may need no lock of ours
    lock.lock();
  }
}

// Looks for work for a while, where it came soon the last times, and sleeps then.
void Pool::wait_for_work(Spin& spin, std::unique_lock<std::mutex>& lock) {
  const std::int64_t since = monotonic_ns();
  const Spin::Turn turn = spin.begin(since);
  const std::int64_t until = std::min(turn.until, since + most_spin_ns_.load());
  if (turn.until) {
    awake_.fetch_add(1, std::memory_order_relaxed);
    // Again where others were faster.
    while (idle() && monotonic_ns() < until) {
      lock.unlock();
      while (waiting_.load(std::memory_order_relaxed) == 0 && monotonic_ns() < until) pause_cpu();
      lock.lock();
    }
    awake_.fetch_sub(1, std::memory_order_relaxed);
    spin.end(turn, monotonic_ns());
  }
  posted_.wait(lock, [this] { return !idle(); });
  spin.learn(monotonic_ns() - since);
}

// One piece, with the lock released meanwhile. Who asked may be gone when it returns, and `job` with it.
void Pool::work_on(Job& job, std::unique_lock<std::mutex>& lock) noexcept {
  const std::size_t piece = job.next++;
  if (job.next == job.pieces) {
    jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    waiting_.fetch_sub(1, std::memory_order_relaxed);
  }
  lock.unlock();
  job.call(job.context, piece);
  lock.lock();
  // Who asked may look without the lock: `job` may be gone as soon as nothing is unfinished.
  if (job.unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) finished_.notify_all();
}

}  // namespace expertd
