#include "base/cpus.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
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

// C's files: streams crash where this library brings a libstdc++ of its own beside that of others in the process.
struct Close {
  void operator()(std::FILE* file) const noexcept { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, Close>;

// "quota period" in microseconds; a quota is "max" or -1 where there is none, and then reads as none.
double quota(const std::string& path) {
  const File limit(std::fopen(path.c_str(), "re"));
  double microseconds = 0;
  double period = 0;
  const bool read = limit && std::fscanf(limit.get(), "%lf %lf", &microseconds, &period) == 2;
  return read && microseconds > 0 && period > 0 ? microseconds / period : UNLIMITED;
}

// The least quota of this process's cgroup and those above it, as far as they can be seen. Empty files elsewhere.
double by_cgroups() {
  double least = UNLIMITED;
  const File memberships(std::fopen("/proc/self/cgroup", "re"));
  char line[4096];
  while (memberships && std::fgets(line, sizeof line, memberships.get())) {
    std::string path(line);
    path.resize(path.find_last_not_of('\n') + 1);
    if (!path.starts_with("0::")) continue;
    for (path.erase(0, 3); !path.empty(); path.resize(path.rfind('/')))
      least = std::min(least, quota("/sys/fs/cgroup" + path + "/cpu.max"));
  }
  return std::min(least, quota("/sys/fs/cgroup/cpu.max"));
}

}  // namespace

std::size_t usable_cpus() {
  return static_cast<std::size_t>(std::max(1.0, std::min(by_affinity(), std::ceil(by_cgroups()))));
}

}  // namespace expertd
