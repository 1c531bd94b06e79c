#if __has_include(<sys/resource.h>)
#include <sys/resource.h>
#endif

#include <algorithm>

#include "base/control_groups.h"
#include "base/cpus.h"
#include "base/spin.h"

namespace expertd {
namespace {

class ThisHost : public SpinHost {
 public:
  double usable_cpus() override { return std::min(cpus_by_affinity(), groups_.quota()); }

  int64_t preemptions() override {
#ifdef RUSAGE_THREAD
    rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nivcsw;
#else
    return 0;  // nobody tells
#endif
  }

  int64_t throttles() override { return groups_.throttles(); }

 private:
  ControlGroups groups_;
};

}  // namespace

SpinHost& SpinHost::here() {
  // Never destroyed: threads of the pool outlive every static object.
  static auto* host = new ThisHost;
  return *host;
}

}  // namespace expertd
