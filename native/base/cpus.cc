#include "base/cpus.h"

#include <algorithm>
#include <cmath>
#include <thread>

#include "base/control_groups.h"

#if __has_include(<sched.h>)
#include <sched.h>
#endif

namespace expertd {

double cpus_by_affinity() {
#ifdef CPU_COUNT
  cpu_set_t allowed;
  // More CPUs than the set has room for are as good as all that there are.
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return std::thread::hardware_concurrency();
}

std::size_t usable_cpus() {
  const double quota = std::ceil(ControlGroups().quota());
  return static_cast<std::size_t>(std::max(1.0, std::min(cpus_by_affinity(), quota)));
}

}  // namespace expertd
