// Which (token, expert) pairs go to which server.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace expertd {

// [tokens, top_k] row by row: global expert ids, negative for none, and what their outputs are multiplied with.
struct Choice {
  std::span<const std::int32_t> ids;
  std::span<const float> weights;
  std::size_t top_k;
};

// Who computes each expert, for as many shares of the tokens as there are rows: one after another, and as equal as can
// be.
struct Shares {
  std::span<const std::int64_t> owner;  // [shares, experts], negative for nobody
  std::size_t experts;

  // [experts]
  std::span<const std::int64_t> of(std::size_t token, std::size_t tokens) const {
    return owner.subspan(token * (owner.size() / experts) / tokens * experts, experts);
  }
};

// Rows of all servers, the first one's first: at most as many as there are pairs.
struct Parts {
  std::int64_t* tokens;  // [rows]: a token's index, ascending for each server
  std::int32_t* ids;     // [rows, top_k]: -1 where the expert is another server's
  float* weights;        // [rows, top_k]: 0 beside a -1
};

// (server, rows of its part), ascending. Where experts without an owner are chosen, `orphans` gets them and nothing is
// written. Throws std::out_of_range for an expert that `shares` lack.
std::vector<std::pair<std::int64_t, std::size_t>> split(const Choice& choice, const Shares& shares, const Parts& out,
                                                        std::vector<std::int32_t>& orphans);

// How often `ids` names each expert up to the greatest: the receipt for them. Negative ids are none.
std::vector<std::int64_t> count_pairs(std::span<const std::int32_t> ids);

}  // namespace expertd
