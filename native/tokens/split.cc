#include "tokens/split.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace expertd {
namespace {

constexpr auto NONE = static_cast<std::size_t>(-1);

struct Server {
  std::size_t rows = 0;
  std::size_t newest = NONE;  // the last token that it got
};

// Calls `use(pair, owner)` for every pair of one token. Throws std::out_of_range for an expert that `owner` lacks.
template <typename Use>
void for_each_of(const Choice& choice, std::size_t token, std::span<const std::int64_t> owner, const Use& use) {
  for (std::size_t pair = token * choice.top_k; pair < (token + 1) * choice.top_k; ++pair) {
    const std::int32_t id = choice.ids[pair];
    if (id < 0) continue;
    if (static_cast<std::size_t>(id) >= owner.size()) throw std::out_of_range("expert " + std::to_string(id));
    use(pair, owner[static_cast<std::size_t>(id)]);
  }
}

// The same for every pair.
template <typename Use>
void for_each_pair(const Choice& choice, const Shares& shares, const Use& use) {
  const std::size_t tokens = choice.top_k ? choice.ids.size() / choice.top_k : 0;
  for (std::size_t token = 0; token < tokens; ++token) {
    for_each_of(choice, token, shares.experts ? shares.of(token, tokens) : shares.owner, use);
  }
}

}  // namespace

std::vector<std::pair<std::int64_t, std::size_t>> split(const Choice& choice, const Shares& shares, const Parts& out,
                                                        std::vector<std::int32_t>& orphans) {
  const std::size_t top_k = choice.top_k;
  const auto last = std::max_element(shares.owner.begin(), shares.owner.end());
  std::vector<Server> servers(
      last == shares.owner.end() ? 0 : static_cast<std::size_t>(std::max<std::int64_t>(*last, -1) + 1));
  for_each_pair(choice, shares, [&](std::size_t pair, std::int64_t server) {
    if (server < 0) return orphans.push_back(choice.ids[pair]);
    Server& mine = servers[static_cast<std::size_t>(server)];
    mine.rows += mine.newest != pair / top_k;
    mine.newest = pair / top_k;
  });
  if (!orphans.empty()) return {};
  std::vector<std::pair<std::int64_t, std::size_t>> counts;
  std::size_t rows = 0;
  for (std::size_t server = 0; server < servers.size(); ++server) {
    const std::size_t count = servers[server].rows;
    if (count) counts.emplace_back(server, count);
    servers[server] = {rows, NONE};  // from here on: the row that it gets next
    rows += count;
  }
  std::fill_n(out.ids, rows * top_k, -1);
  std::fill_n(out.weights, rows * top_k, 0.0f);
  for_each_pair(choice, shares, [&](std::size_t pair, std::int64_t server) {
    Server& mine = servers[static_cast<std::size_t>(server)];
    if (mine.newest != pair / top_k) {
      mine.newest = pair / top_k;
      out.tokens[mine.rows++] = static_cast<std::int64_t>(mine.newest);
    }
    const std::size_t place = (mine.rows - 1) * top_k + pair % top_k;
    out.ids[place] = choice.ids[pair];
    out.weights[place] = choice.weights[pair];
  });
  return counts;
}

std::vector<std::int64_t> count_pairs(std::span<const std::int32_t> ids) {
  const auto last = std::max_element(ids.begin(), ids.end());
  std::vector<std::int64_t> pairs(last == ids.end() ? 0
                                                    : static_cast<std::size_t>(std::max(*last, -1) + std::int64_t{1}));
  for (const std::int32_t id : ids)
    if (id >= 0) ++pairs[static_cast<std::size_t>(id)];
  return pairs;
}

}  // namespace expertd
