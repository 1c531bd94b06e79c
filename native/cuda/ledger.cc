#include "cuda/ledger.h"

#include <algorithm>
#include <cstring>
#include <optional>

namespace expertd::cuda {

namespace {

constexpr int kKernelNode = 0, kCopyNode = 1, kFillNode = 2, kEmptyNode = 5;
constexpr std::array<const char*, kNames> kNameTexts = {
    "ids",    "weights", "hidden", "scales", "sums",   "pairs",  "up_gate", "up_gate_scales", "down",  "down_scales",
    "result", "part 0",  "part 1", "part 2", "part 3", "part 4", "part 5",  "part 6",         "part 7"};

uint64_t word_at(const std::vector<std::byte>& argument, size_t offset) {
  uint64_t word;
  std::memcpy(&word, argument.data() + offset, sizeof word);
  return word;
}

std::optional<Name> name_of(uint64_t word, const Ranges& captured) {
  for (size_t i = 0; i < kNames; i++)
    if (word - captured[i].address < captured[i].bytes) return Name{static_cast<uint8_t>(i)};
  return std::nullopt;
}

// The kernel's arguments, whose sizes only its code knows.
std::vector<std::vector<std::byte>> copy_arguments(const Driver& driver, const KernelNodeParams& params) {
  std::vector<std::vector<std::byte>> arguments;
  for (size_t offset, bytes;;) {
    int code = params.func ? driver.cuFuncGetParamInfo(params.func, arguments.size(), &offset, &bytes)
                           : driver.cuKernelGetParamInfo(params.kernel, arguments.size(), &offset, &bytes);
    if (code == kCudaInvalidValue) return arguments;  // past the last one
    driver.check(code);
    if (!params.arguments) throw DeviceError("a captured kernel has its arguments in one buffer");
    auto begin = static_cast<const std::byte*>(params.arguments[arguments.size()]);
    arguments.emplace_back(begin, begin + bytes);
  }
}

}  // namespace

Graph::Graph(const Driver& driver, void* graph, const Ranges& captured) : driver_(driver) {
  void* clone = nullptr;
  driver.check(driver.cuGraphClone(&clone, graph));
  graph_ = {driver, clone};
  size_t count = 0;
  driver.check(driver.cuGraphGetNodes(clone, nullptr, &count));
  std::vector<void*> nodes(count);
  driver.check(driver.cuGraphGetNodes(clone, nodes.data(), &count));
  for (void* node : nodes) read(node, captured);
  void* exec = nullptr;
  driver.check(driver.cuGraphInstantiateWithFlags(&exec, clone, 0));
  exec_ = {driver, exec};
}

bool Graph::uses(Name name) const {
  return std::any_of(kernels_.begin(), kernels_.end(), [name](const Kernel& kernel) {
    return std::any_of(kernel.words.begin(), kernel.words.end(),
                       [name](const Word& word) { return word.name == name; });
  });
}

Steps make_steps(const Driver& driver, const std::vector<void*>& graphs, const Ranges& captured) {
  Steps steps;
  for (void* graph : graphs) steps.emplace_back(driver, graph, captured);
  for (size_t i = 0; i < kNames; i++) {
    const auto uses = [name = static_cast<Name>(i)](const Graph& graph) { return graph.uses(name); };
    if (captured[i].bytes && std::none_of(steps.begin(), steps.end(), uses))
      throw DeviceError(std::string("no captured kernel is given ") + kNameTexts[i]);
  }
  return steps;
}

void Graph::read(void* node, const Ranges& captured) {
  int type = 0;
  driver_.check(driver_.cuGraphNodeGetType(node, &type));
  if (type == kCopyNode || type == kFillNode || type == kEmptyNode) return;
  if (type != kKernelNode) throw DeviceError("a captured graph holds a node of type " + std::to_string(type));
  Kernel kernel{};
  kernel.node = node;
  driver_.check(driver_.cuGraphKernelNodeGetParams(node, &kernel.params));
  kernel.arguments = copy_arguments(driver_, kernel.params);
  for (size_t argument = 0; argument < kernel.arguments.size(); argument++) {
    const auto& bytes = kernel.arguments[argument];
    for (size_t offset = 0; offset + sizeof(uint64_t) <= bytes.size(); offset += sizeof(uint64_t)) {
      uint64_t word = word_at(bytes, offset);
      if (auto name = name_of(word, captured))
        kernel.words.push_back({*name, argument, offset, word - captured[static_cast<size_t>(*name)].address});
    }
  }
  if (kernel.words.empty()) return;
  for (auto& argument : kernel.arguments) kernel.pointers.push_back(argument.data());
  kernel.params.arguments = kernel.pointers.data();  // the graph's own may go with it
  kernels_.push_back(std::move(kernel));
}

void Graph::resize(unsigned blocks) {
  for (Kernel& kernel : kernels_) {
    if (kernel.params.grid_x == blocks) continue;
    kernel.params.grid_x = blocks;
    kernel.stale = true;
  }
}

void Graph::bind(const Addresses& addresses) {
  for (Kernel& kernel : kernels_) {
    for (const Word& word : kernel.words) {
      auto& argument = kernel.arguments[word.argument];
      uint64_t wanted = addresses[static_cast<size_t>(word.name)] + word.displacement;
      if (word_at(argument, word.offset) == wanted) continue;
      std::memcpy(argument.data() + word.offset, &wanted, sizeof wanted);
      kernel.stale = true;
    }
    if (!kernel.stale) continue;
    driver_.check(driver_.cuGraphExecKernelNodeSetParams(exec_.get(), kernel.node, &kernel.params));
    kernel.stale = false;
  }
}

}  // namespace expertd::cuda
