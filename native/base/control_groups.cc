#include "base/control_groups.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string_view>

namespace expertd {
namespace {

// C's files: streams crash where this library brings a libstdc++ of its own beside that of others in the process.
struct Close {
  void operator()(std::FILE* file) const noexcept { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, Close>;

File open(const std::filesystem::path& path) { return File(std::fopen(path.c_str(), "re")); }

// The first number of a file, or -1: files of the other version are not there, and "max" is none.
double number_in(const std::filesystem::path& path) {
  const File file = open(path);
  double value = -1;
  return file && std::fscanf(file.get(), "%lf", &value) == 1 && value > 0 ? value : -1;
}

double quota_of(const std::filesystem::path& group) {
  const File file = open(group / "cpu.max");  // "QUOTA PERIOD" or "max PERIOD"
  double quota = -1, period = -1;
  if (!file || std::fscanf(file.get(), "%lf %lf", &quota, &period) != 2) {
    quota = number_in(group / "cpu.cfs_quota_us");
    period = number_in(group / "cpu.cfs_period_us");
  }
  return quota > 0 && period > 0 ? quota / period : std::numeric_limits<double>::infinity();
}

int64_t throttles_of(const std::filesystem::path& group) {
  const File file = open(group / "cpu.stat");
  char name[64];
  long long value = 0;
  while (file && std::fscanf(file.get(), "%63s %lld", name, &value) == 2) {
    if (std::string_view(name) == "nr_throttled") return value;
  }
  return 0;
}

// Whether a line's controllers, "cpu,cpuacct", have cpu among them; version 2 names none.
bool names_cpu(const std::string& controllers) {
  return controllers.empty() || ("," + controllers + ",").find(",cpu,") != std::string::npos;
}

}  // namespace

ControlGroups::ControlGroups(const std::filesystem::path& mounted, const std::filesystem::path& self) {
  const File file = open(self);
  char bytes[4096];
  while (file && std::fgets(bytes, sizeof bytes, file.get())) {  // "ID:CONTROLLERS:/PATH"
    const std::string line(bytes, std::strcspn(bytes, "\n"));
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!names_cpu(controllers)) continue;
    std::filesystem::path group = controllers.empty() ? mounted : mounted / "cpu";
    groups_.push_back(group);
    // In a container, what is mounted is often our own group, and our path the host's: then only the first is there.
    for (const auto& part : std::filesystem::path(line.substr(second + 1)).relative_path())
      groups_.push_back(group /= part);
  }
}

double ControlGroups::quota() const {
  double smallest = std::numeric_limits<double>::infinity();
  for (const auto& group : groups_) smallest = std::min(smallest, quota_of(group));
  return smallest;
}

int64_t ControlGroups::throttles() const {
  int64_t most = 0;
  for (const auto& group : groups_) most = std::max(most, throttles_of(group));
  return most;
}

}  // namespace expertd
