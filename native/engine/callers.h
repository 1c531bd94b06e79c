// What each identity was answered and refused: the heaviest ones by name, all others together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace expertd {

// Bounded, whatever callers call themselves. Everything is counted once, under the name that its caller has at the
// time, so no count ever falls: who gets a name begins at nothing, and who loses it takes its count along and is one of
// the others from then on. Any thread may count and read at once; a lock is held for no longer than a scan or a copy of
// a few names.
class Callers {
 public:
  static constexpr size_t kNamed = 16;             // have a name of their own
  static constexpr size_t kKnown = 64;             // are weighed, so that the heavy ones among them get a name
  static constexpr uint64_t kRefusalWeight = 64;   // in tokens: who is always refused is to be seen as well
  static constexpr uint64_t kHalfLife = 1u << 20;  // after so much of all, what came before weighs half

  struct Count {
    std::string identity;
    uint64_t tokens = 0, refusals = 0;
  };

  void answered(std::string_view identity, uint64_t tokens) { count(identity, tokens, tokens, 0); }
  void refused(std::string_view identity) { count(identity, kRefusalWeight, 0, 1); }

  // Those with a name, at most kNamed.
  std::vector<Count> named() const;
  // All others, without one.
  Count others() const;

 private:
  struct Known {
    Count count;
    uint64_t weight = 0;
    uint64_t inherited = 0;  // of that, from those whose place it took
    uint64_t own() const { return weight - inherited; }
  };

  void count(std::string_view identity, uint64_t weight, uint64_t tokens, uint64_t refusals);
  size_t find(std::string_view identity);
  size_t name_if_heavy(size_t index);
  void age(uint64_t weight);

  mutable std::mutex mutex_;
  std::vector<Known> known_;  // the first kNamed have names
  Count others_;
  uint64_t weighed_ = 0;  // since weights were halved
};

}  // namespace expertd
