// Something to call once work is done, which may be exchanged at any time.
#pragma once

#include <functional>
#include <mutex>
#include <utility>

namespace expertd {

// Calls what it was given last. Any thread.
class Waker {
 public:
  // What it had before is not called any more once this returns.
  void set(std::function<void()> wake) {
    const std::lock_guard lock(mutex_);
    wake_ = std::move(wake);
  }
  void wake() {
    const std::lock_guard lock(mutex_);
    if (wake_) wake_();
  }

 private:
  std::mutex mutex_;
  std::function<void()> wake_;
};

}  // namespace expertd
