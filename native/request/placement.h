// What a server owns, as requests are checked against it.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace expertd {

// A device that has an expert, and the number by which it knows it.
struct Home {
  uint32_t device;
  int32_t local;
};

// What a server owns of one layer.
struct OwnedLayer {
  uint32_t layer = 0;                  // in the model
  std::vector<uint32_t> experts = {};  // global ids, ascending; the position is the local id
  std::string experts_text = {};       // as people write them: 3-60
  uint64_t key = 0;                    // what the executor knows its weights by
  // Where the device has them: up_gate, its scales, down, its scales. Zeros on a CPU.
  std::array<uint64_t, 4> weights = {};
  // Where there are several devices, what each of them has: their `experts` are local ids of this layer, in any order.
  std::vector<OwnedLayer> devices = {};
  std::vector<int32_t> local_ids = {};        // by global id; -1 for experts of other servers
  std::vector<std::vector<Home>> homes = {};  // by local id, where there are several devices: ascending
};

// What a server owns, and what a request is checked against: immutable, shared by the requests that were.
struct Placement {
  std::string model_fingerprint;
  uint64_t epoch = 0;
  std::vector<OwnedLayer> layers;  // ascending
  std::string layers_text;
  uint32_t num_routed_experts = 0;
  uint32_t hidden_size = 0;
  uint32_t max_top_k = 0;
  uint32_t max_tokens = 0;  // of one request
  // Other weights of the same experts, of the same epoch, for requests that name their fingerprint; null: none.
  std::shared_ptr<const Placement> beside = nullptr;

  // Null when nothing of it is owned.
  const OwnedLayer* find(uint64_t layer) const;
};

using PlacementPtr = std::shared_ptr<const Placement>;

// Fills the tables of local ids and homes. Experts are ascending and below `num_routed_experts`. Throws
// std::out_of_range for a device's expert that the layer does not have.
PlacementPtr make_placement(Placement placement);

// What requests that name `fingerprint` are checked against: of a placement and the one beside it the one that has it,
// and otherwise the former.
PlacementPtr generation_of(const PlacementPtr& placement, std::string_view fingerprint);

}  // namespace expertd
