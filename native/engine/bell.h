// Waking a thread that sleeps in poll(), without a system call where none sleeps.
#pragma once

#include <atomic>
#include <cstdint>

namespace expertd {

// How threads wake one that sleeps in poll(): an eventfd that is written only while somebody sleeps on it.
//
// The sleeper calls arm(), looks once more for work, sleeps until fd() is readable, and calls disarm(). A waker makes
// its work visible (seq_cst) and calls ring(). The two flags have one total order: either the sleeper's second look
// finds the work, or the waker finds the sleeper armed, and then the byte waits in the eventfd whether the sleep has
// begun or not.
class Bell {
 public:
  Bell();  // throws std::system_error
  ~Bell();
  Bell(const Bell&) = delete;
  Bell& operator=(const Bell&) = delete;

  int fd() const { return fd_; }
  void arm() { asleep_.store(true, std::memory_order_seq_cst); }
  // Empties the eventfd, if somebody has rung.
  void disarm();
  void ring();

 private:
  int fd_;
  std::atomic<bool> asleep_{false};
};

}  // namespace expertd
