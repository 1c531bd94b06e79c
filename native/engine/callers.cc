#include "engine/callers.h"

#include <algorithm>
#include <utility>

namespace expertd {

std::vector<Callers::Count> Callers::named() const {
  const std::lock_guard lock(mutex_);
  std::vector<Count> counts;
  for (size_t i = 0; i < std::min(known_.size(), kNamed); ++i) counts.push_back(known_[i].count);
  return counts;
}

Callers::Count Callers::others() const {
  const std::lock_guard lock(mutex_);
  return others_;
}

void Callers::count(std::string_view identity, uint64_t weight, uint64_t tokens, uint64_t refusals) {
  const std::lock_guard lock(mutex_);
  age(weight);
  size_t index = find(identity);
  known_[index].weight += weight;
  index = name_if_heavy(index);
  Count& count = index < kNamed ? known_[index].count : others_;
  count.tokens += tokens;
  count.refusals += refusals;
}

size_t Callers::find(std::string_view identity) {
  const auto found = std::find_if(known_.begin(), known_.end(),
                                  [identity](const Known& known) { return known.count.identity == identity; });
  if (found != known_.end()) return static_cast<size_t>(found - known_.begin());
  if (known_.size() < kKnown) {
    known_.push_back({.count = {.identity = std::string(identity)}});
    return known_.size() - 1;
  }
  // The lightest makes room, and leaves its weight: so who is heavy is found among any number of callers.
  const auto lightest = std::min_element(known_.begin() + kNamed, known_.end(),
                                         [](const Known& a, const Known& b) { return a.weight < b.weight; });
  lightest->count.identity = identity;
  lightest->inherited = lightest->weight;
  return static_cast<size_t>(lightest - known_.begin());
}

// Its place afterwards. Only who weighs twice as much takes a name from another, and what it inherited does not count:
// neither equals nor strangers who come once change names to and fro.
size_t Callers::name_if_heavy(size_t index) {
  if (index < kNamed) return index;
  const auto lightest = std::min_element(known_.begin(), known_.begin() + kNamed,
                                         [](const Known& a, const Known& b) { return a.own() < b.own(); });
  if (known_[index].own() <= 2 * lightest->own()) return index;
  lightest->count.tokens = lightest->count.refusals = 0;
  std::swap(*lightest, known_[index]);
  return static_cast<size_t>(lightest - known_.begin());
}

void Callers::age(uint64_t weight) {
  weighed_ += weight;
  if (weighed_ < kHalfLife) return;
  weighed_ = 0;
  for (Known& known : known_) {
    known.inherited /= 2;
    known.weight /= 2;
  }
}

}  // namespace expertd
