// The interpreter's lock, let go of for a while.
#pragma once

#include <pybind11/pybind11.h>

namespace expertd {

// Without the lock as long as it lives, if `wanted`.
//
// A thread that asks for the lock while the interpreter ends does not go on: before Python 3.14 its stack is unwound.
// The destructor lets that pass; pybind11's own guard does not, and std::terminate ends the process.
class Unlocked {
 public:
  explicit Unlocked(bool wanted = true) : state_(wanted ? PyEval_SaveThread() : nullptr) {}
  ~Unlocked() noexcept(false) {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* const state_;
};

}  // namespace expertd
