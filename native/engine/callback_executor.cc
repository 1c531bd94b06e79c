#include "engine/callback_executor.h"

#include <utility>

namespace expertd {

void CallbackExecutor::start(std::unique_ptr<Batch> batch, uint64_t) {
  {
    // Held elsewhere for a few instructions only.
    const std::lock_guard lock(mutex_);
    ready_.push_back(std::move(batch));
  }
  changed_.notify_one();
}

std::unique_ptr<Batch> CallbackExecutor::poll(uint64_t) {
  if (taken_.empty()) {
    for (auto& batch : done_.take()) taken_.push_back(std::move(batch));
  }
  if (taken_.empty()) return nullptr;
  auto batch = std::move(taken_.front());
  taken_.pop_front();
  return batch;
}

std::unique_ptr<Batch> CallbackExecutor::fetch() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return interrupts_ > 0 || !ready_.empty(); });
  if (interrupts_ > 0) {
    --interrupts_;
    return nullptr;
  }
  auto batch = std::move(ready_.front());
  ready_.pop_front();
  return batch;
}

void CallbackExecutor::interrupt() {
  {
    const std::lock_guard lock(mutex_);
    ++interrupts_;
  }
  changed_.notify_one();
}

void CallbackExecutor::give_back(std::unique_ptr<Batch> batch) {
  done_.add(std::move(batch));
  wake();
}

}  // namespace expertd
