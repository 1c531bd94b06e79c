#include "request/placement.h"

#include <algorithm>

namespace expertd {

const OwnedLayer* Placement::find(uint64_t layer) const {
  const auto found = std::lower_bound(layers.begin(), layers.end(), layer,
                                      [](const OwnedLayer& owned, uint64_t wanted) { return owned.layer < wanted; });
  return found == layers.end() || found->layer != layer ? nullptr : &*found;
}

PlacementPtr make_placement(Placement placement) {
  for (OwnedLayer& owned : placement.layers) {
    owned.local_ids.assign(placement.num_routed_experts, -1);
    for (size_t local = 0; local < owned.experts.size(); ++local) {
      owned.local_ids.at(owned.experts[local]) = static_cast<int32_t>(local);
    }
    if (!owned.devices.empty()) owned.homes.assign(owned.experts.size(), {});
    for (uint32_t device = 0; device < owned.devices.size(); ++device) {
      const std::vector<uint32_t>& its = owned.devices[device].experts;
      for (size_t local = 0; local < its.size(); ++local)
        owned.homes.at(its[local]).push_back({device, static_cast<int32_t>(local)});
    }
  }
  return std::make_shared<const Placement>(std::move(placement));
}

PlacementPtr generation_of(const PlacementPtr& placement, std::string_view fingerprint) {
  const PlacementPtr& beside = placement->beside;
  return beside && beside->model_fingerprint == fingerprint ? beside : placement;
}

}  // namespace expertd
