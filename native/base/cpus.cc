#include "base/cpus.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <string>
#include <thread>

#if __has_include(<sched.h>)
#include <sched.h>
#endif

namespace expertd {
namespace {

constexpr double UNLIMITED = std::numeric_limits<double>::infinity();

double by_affinity() {
#ifdef CPU_COUNT
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return std::thread::hardware_concurrency();
}

// "quota period" in microseconds; a quota is "max" or -1 where there is none, and then reads as none.
double quota(std::istream&& limit) {
  double microseconds = 0;
  double period = 0;
  return limit >> microseconds >> period && microseconds > 0 && period > 0 ? microseconds / period : UNLIMITED;
}

// The least quota of this process's cgroup and those above it, as far as they can be seen. Empty files elsewhere.
double by_cgroups() {
  double least = UNLIMITED;
  std::ifstream memberships("/proc/self/cgroup");
  for (std::string line; std::getline(memberships, line);) {
    if (!line.starts_with("0::")) continue;
    for (std::string path = line.substr(3); !path.empty(); path.resize(path.rfind('/')))
      least = std::min(least, quota(std::ifstream("/sys/fs/cgroup" + path + "/cpu.max")));
  }
  return std::min(least, quota(std::ifstream("/sys/fs/cgroup/cpu.max")));
}

}  // namespace

std::size_t usable_cpus() {
  return static_cast<std::size_t>(std::max(1.0, std::min(by_affinity(), std::ceil(by_cgroups()))));
}

}  // namespace expertd
