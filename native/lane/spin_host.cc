#include <sched.h>
#include <sys/resource.h>

#include <algorithm>

#include "lane/control_groups.h"
#include "lane/spin.h"

namespace expertd {
namespace {

class ThisHost : public SpinHost {
 public:
  double usable_cpus() override {
    cpu_set_t set;
    CPU_ZERO(&set);
    // More CPUs than the set has room for are enough to spin on.
    if (sched_getaffinity(0, sizeof set, &set) != 0) return std::min<double>(CPU_SETSIZE, groups_.quota());
    return std::min<double>(CPU_COUNT(&set), groups_.quota());
  }

  int64_t preemptions() override {
    rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nivcsw;
  }

  int64_t throttles() override { return groups_.throttles(); }

 private:
  ControlGroups groups_;
};

}  // namespace

SpinHost& SpinHost::here() {
  static ThisHost host;
  return host;
}

}  // namespace expertd
