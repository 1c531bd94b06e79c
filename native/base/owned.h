// What belongs to the process that made it.
#pragma once

#include <unistd.h>

namespace expertd {

// What belongs to the process that made it. A child made by fork has the memory, but none of the threads, and locks may
// be held for ever: there it is not used, and destroyed only as far as files are closed.
class Owned {
 public:
  bool here() const { return getpid() == pid_; }

 private:
  const pid_t pid_ = getpid();
};

}  // namespace expertd
