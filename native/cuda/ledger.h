// Captured graphs whose kernel arguments have names, so that one graph serves every layer.
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "cuda/driver.h"
#include "engine/batch.h"
#include "request/message.h"

namespace expertd::cuda {

// Memory that a graph's kernels are given addresses of, and that another launch may find elsewhere.
enum class Name : uint8_t {
  kIds,
  kWeights,
  kHidden,
  kScales,
  kSums,
  kPairs,
  kUpGate,
  kUpGateScales,
  kDown,
  kDownScales,
  kAdded,  // of graphs that add: where the sums go, and the first of what devices have
  kPart
};
inline constexpr size_t kMostParts = 8, kNames = 11 + kMostParts;

struct Range {
  DevicePointer address = 0;
  size_t bytes = 0;
};

using Ranges = std::array<Range, kNames>;             // what is not there has no bytes
using Addresses = std::array<DevicePointer, kNames>;  // what is not there: 0

// A captured kernel, some words of whose arguments are addresses that have names.
class Kernel {
 public:
  // `node`: a kernel's. `captured`: what it was captured with. Throws `DeviceError`.
  Kernel(const Driver& driver, void* node, const Ranges& captured);
  Kernel(Kernel&&) = default;

  bool has_names() const { return !words_.empty(); }
  bool uses(Name name) const;
  // Sets the named words; whether any was not what `addresses` says.
  bool bind(const Addresses& addresses);
  const KernelNodeParams& params() const { return params_; }

 private:
  struct Word {
    Name name;
    size_t argument, offset;  // in bytes, from the start of the argument
    uint64_t displacement;    // from the start of what the name stands for
  };

  KernelNodeParams params_{};
  std::vector<std::vector<std::byte>> arguments_;
  std::vector<void*> pointers_;  // to the arguments, as `params_` wants them
  std::vector<Word> words_;
};

// A captured kernel that is launched alone: on any stream, with any number of blocks, and with arguments that are the
// launch's own, so that one launch need not have ended for the next.
class LoneKernel {
 public:
  // Of a graph that holds nothing else. Throws `DeviceError`.
  LoneKernel(const Driver& driver, void* graph, const Ranges& captured);
  // With so many blocks in its first dimension. Throws `DeviceError`.
  void launch(const Addresses& addresses, unsigned blocks, const Stream& stream);

 private:
  const Driver& driver_;
  Kernel kernel_;
};

// One captured graph of kernels, ready to be launched with other addresses than it was captured with.
class Graph {
 public:
  // Copies a captured graph. `captured`: what it was captured with. Throws `DeviceError` for a graph that holds more
  // than kernels, copies and fills: a copy's addresses stay.
  Graph(const Driver& driver, void* graph, const Ranges& captured);

  // Whether a kernel is given it.
  bool uses(Name name) const;

  // Sets the kernels whose named words are not what `addresses` says. The launches before are not affected.
  void bind(const Addresses& addresses);
  void launch(void* stream) const { driver_.check(driver_.cuGraphLaunch(exec_.get(), stream)); }
  // Moves what the device needs of the graph there, so that the first launch is like the others.
  void upload(void* stream) const { driver_.check(driver_.cuGraphUpload(exec_.get(), stream)); }

 private:
  struct Node {
    void* node;
    Kernel kernel;
    bool stale = false;  // a setting failed: what the executable has is not known
  };

  void read(void* node, const Ranges& captured);

  const Driver& driver_;
  GraphHandle graph_;
  GraphExec exec_;
  std::vector<Node> nodes_;  // whose kernels have named words
};

// What computes a part of a batch: one graph, or more, each of which leaves as many columns of the sums.
using Steps = std::vector<Graph>;
// Copies captured graphs. Throws `DeviceError` for such as together are not given all of `captured`.
Steps make_steps(const Driver& driver, const std::vector<void*>& graphs, const Ranges& captured);

// The graphs of one kind of batches, once for each bay that has such, and what their launches took.
struct Entry {
  std::vector<Steps> steps;
  uint64_t expected_ns =
      0;                    // for a part, from the launch of its batch to the end, by the last times; 0: never launched
  DeviceSeconds seconds{};  // the last that were measured
  uint32_t untimed = 0;     // launches since then
};

// The graphs of all kinds of batches.
class Ledger {
 public:
  struct Key {
    uint32_t tokens;  // of the size class
    Dtype hidden_dtype, reply_dtype;
    bool in_steps = false;  // whether in more than one
    auto operator<=>(const Key&) const = default;
  };

  // Takes the place of earlier graphs for the same batches.
  void add(const Key& key, std::vector<Steps> steps) {
    entries_.erase(key);
    entries_.emplace(key, Entry{.steps = std::move(steps)});
  }
  Entry* find(const Key& key) {
    auto found = entries_.find(key);
    return found == entries_.end() ? nullptr : &found->second;
  }

 private:
  std::map<Key, Entry> entries_;
};

}  // namespace expertd::cuda
