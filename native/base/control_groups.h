// What this process's control groups allow it of the processors.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace expertd {

// The control groups that bound this process's CPU time, its own and those above, of either version.
class ControlGroups {
 public:
  // `mounted` is where they are, `self` which are ours: /sys/fs/cgroup and /proc/self/cgroup but in tests.
  explicit ControlGroups(const std::filesystem::path& mounted = "/sys/fs/cgroup",
                         const std::filesystem::path& self = "/proc/self/cgroup");

  // The smallest quota, in CPUs; infinity without one.
  double quota() const;
  // How often a quota has stopped us.
  int64_t throttles() const;

 private:
  std::vector<std::filesystem::path> groups_;
};

}  // namespace expertd
