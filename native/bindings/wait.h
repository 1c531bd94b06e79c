// Waiting of a Python thread, which signals end.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "base/clock.h"
#include "bindings/unlocked.h"
#include "lane/ring.h"

namespace expertd {

// Signals can come before the sleep that they were to end, and to other threads: so long they may go unseen.
inline constexpr int64_t kSignalNs = 100'000'000;

// `wait(deadline_ns)` without the interpreter's lock, until it is done, lost or unknown, or `timeout` seconds are over:
// then it says kExpired. Throws what a signal's handler raises.
template <typename Work>
Wait wait_with_signals(std::optional<double> timeout, const Work& wait) {
  const int64_t deadline = timeout ? monotonic_ns() + static_cast<int64_t>(*timeout * 1e9) : INT64_MAX;
  for (;;) {
    Wait how;
    {
      const Unlocked unlocked;
      how = wait(std::min(deadline, monotonic_ns() + kSignalNs));
    }
    if (how != Wait::kExpired && how != Wait::kInterrupted) return how;
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
    if (monotonic_ns() >= deadline) return Wait::kExpired;
  }
}

}  // namespace expertd
