#include "base/pool.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <utility>

#include "base/cpus.h"

namespace expertd {
namespace {

constexpr std::size_t MOST_THREADS = 8;

std::atomic<Pool*> current{nullptr};

}  // namespace

Pool& Pool::of_process() {
  Pool* pool = current.load(std::memory_order_acquire);
  if (pool && pool->here()) return *pool;
  // Never deleted once it is the current one: its threads may outlive every static object.
  auto* fresh = new Pool(std::min(MOST_THREADS, usable_cpus()));
  if (current.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;  // another thread was faster
  return *pool;
}

Pool::Pool(std::size_t size) : size_(size) {}

void Pool::share(Job job) {
  const std::size_t others = std::min(job.pieces, size_) - 1;
  std::unique_lock lock(lock_);
  jobs_.push_back(&job);
  start_threads(others);
  for (std::size_t waking = 0; waking < others; ++waking) posted_.notify_one();
  while (job.next < job.pieces) work_on(job, lock);
  finished_.wait(lock, [&] { return job.unfinished == 0; });
}

void Pool::post(std::function<void()> task) {
  {
    const std::lock_guard lock(lock_);
    if (start_threads(size_)) {
      tasks_.push_back(std::move(task));
      posted_.notify_one();
      return;
    }
  }
  task();
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
  std::unique_lock lock(lock_);
  for (;;) {
    posted_.wait(lock, [&] { return !jobs_.empty() || !tasks_.empty(); });
    if (!jobs_.empty()) {
      work_on(*jobs_.front(), lock);
      continue;
    }
    auto task = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    task();
    task = nullptr;  // what it holds may need no lock of ours
    lock.lock();
  }
}

// One piece, with the lock released meanwhile. Who asked may be gone when it returns, and `job` with it.
void Pool::work_on(Job& job, std::unique_lock<std::mutex>& lock) noexcept {
  const std::size_t piece = job.next++;
  if (job.next == job.pieces) jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
  lock.unlock();
  job.call(job.context, piece);
  lock.lock();
  if (--job.unfinished == 0) finished_.notify_all();
}

}  // namespace expertd
