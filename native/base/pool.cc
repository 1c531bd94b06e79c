#include "base/pool.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>

#include "base/cpus.h"

namespace expertd {
namespace {

constexpr std::size_t MOST_THREADS = 8;

std::atomic<Pool*> current{nullptr};

}  // namespace

Pool& Pool::of_process() {
  Pool* pool = current.load(std::memory_order_acquire);
  if (pool && pool->pid_ == getpid()) return *pool;
  // Never deleted once it is the current one: its threads may outlive every static object.
  auto* fresh = new Pool(std::min(MOST_THREADS, usable_cpus()));
  if (current.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;  // another thread was faster
  return *pool;
}

Pool::Pool(std::size_t size) : pid_(getpid()), size_(size) {}

void Pool::share(Job job) {
  const std::size_t others = std::min(job.pieces, size_) - 1;
  std::unique_lock lock(lock_);
  jobs_.push_back(&job);
  start_threads(others);
  for (std::size_t waking = 0; waking < others; ++waking) posted_.notify_one();
  while (job.next < job.pieces) work_on(job, lock);
  finished_.wait(lock, [&] { return job.unfinished == 0; });
}

void Pool::start_threads(std::size_t wanted) {
  try {
    for (; threads_ < wanted; ++threads_) std::thread(&Pool::help, this).detach();
  } catch (const std::system_error&) {
    // No more threads for this process: those that there are do it, if need be the one that asks alone.
  }
}

void Pool::help() noexcept {
  std::unique_lock lock(lock_);
  for (;;) {
    posted_.wait(lock, [&] { return !jobs_.empty(); });
    work_on(*jobs_.front(), lock);
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
