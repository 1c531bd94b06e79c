// How many processors this process may use.
#pragma once

#include <cstddef>

namespace expertd {

// That the scheduler may run it on.
double cpus_by_affinity();

// By affinity and the quotas of its cgroups, rounded up; at least 1.
std::size_t usable_cpus();

}  // namespace expertd
