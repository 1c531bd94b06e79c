// What a server owns, as requests are checked against it.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace expertd {

// What a server owns, and what a request is checked against: immutable, shared by the requests that were.
struct Placement {
  std::string model_fingerprint;
  uint64_t epoch = 0;
  std::vector<uint32_t> layers;   // ascending
  std::string layers_text;        // as people write them: 3-60
  std::vector<uint32_t> experts;  // global ids, ascending; the position is the local id
  std::string experts_text;
  std::vector<int32_t> local_ids;  // by global id; -1 for experts of other servers
  uint32_t hidden_size = 0;
  uint32_t max_top_k = 0;
  uint32_t max_tokens = 0;  // of one request

  uint32_t num_routed_experts() const { return static_cast<uint32_t>(local_ids.size()); }
  // The position of `layer` among the owned ones, or -1.
  int index_of(uint64_t layer) const;
};

using PlacementPtr = std::shared_ptr<const Placement>;

// Fills the table of local ids. `experts` are ascending and below `num_routed_experts`.
PlacementPtr make_placement(Placement placement, uint32_t num_routed_experts);

}  // namespace expertd
