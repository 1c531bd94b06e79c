#include "request/placement.h"

#include <algorithm>

namespace expertd {

int Placement::index_of(uint64_t layer) const {
  const auto found = std::lower_bound(layers.begin(), layers.end(), layer);
  return found == layers.end() || *found != layer ? -1 : static_cast<int>(found - layers.begin());
}

PlacementPtr make_placement(Placement placement, uint32_t num_routed_experts) {
  placement.local_ids.assign(num_routed_experts, -1);
  for (size_t local = 0; local < placement.experts.size(); ++local) {
    placement.local_ids.at(placement.experts[local]) = static_cast<int32_t>(local);
  }
  return std::make_shared<const Placement>(std::move(placement));
}

}  // namespace expertd
