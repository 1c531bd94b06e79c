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

std::vector<void*> nodes_of(const Driver& driver, void* graph) {
  size_t count = 0;
  driver.check(driver.cuGraphGetNodes(graph, nullptr, &count));
  std::vector<void*> nodes(count);
  driver.check(driver.cuGraphGetNodes(graph, nodes.data(), &count));
  return nodes;
}

int type_of(const Driver& driver, void* node) {
  int type = 0;
  driver.check(driver.cuGraphNodeGetType(node, &type));
  return type;
}

// That kernels are given all that they were captured with; `uses(name)`: whether any is.
template <typename Uses>
void check_given(const Ranges& captured, const Uses& uses) {
  for (size_t i = 0; i < kNames; i++)
    if (captured[i].bytes && !uses(static_cast<Name>(i)))
      throw DeviceError(std::string("no captured kernel is given ") + kNameTexts[i]);
}

void* only_kernel_of(const Driver& driver, void* graph) {
  const std::vector<void*> nodes = nodes_of(driver, graph);
  if (nodes.size() != 1 || type_of(driver, nodes.front()) != kKernelNode)
    throw DeviceError("a captured graph holds other than one kernel: " + std::to_string(nodes.size()) + " nodes");
  return nodes.front();
}

}  // namespace

Kernel::Kernel(const Driver& driver, void* node, const Ranges& captured) {
  driver.check(driver.cuGraphKernelNodeGetParams(node, &params_));
  arguments_ = copy_arguments(driver, params_);
  for (size_t argument = 0; argument < arguments_.size(); argument++) {
    const auto& bytes = arguments_[argument];
    for (size_t offset = 0; offset + sizeof(uint64_t) <= bytes.size(); offset += sizeof(uint64_t)) {
      uint64_t word = word_at(bytes, offset);
      if (auto name = name_of(word, captured))
        words_.push_back({*name, argument, offset, word - captured[static_cast<size_t>(*name)].address});
    }
  }
  for (auto& argument : arguments_) pointers_.push_back(argument.data());
  params_.arguments = pointers_.data();  // the graph's own may go with it
}

bool Kernel::uses(Name name) const {
  return std::any_of(words_.begin(), words_.end(), [name](const Word& word) { return word.name == name; });
}

bool Kernel::bind(const Addresses& addresses) {
  bool changed = false;
  for (const Word& word : words_) {
    auto& argument = arguments_[word.argument];
    uint64_t wanted = addresses[static_cast<size_t>(word.name)] + word.displacement;
    if (word_at(argument, word.offset) == wanted) continue;
    std::memcpy(argument.data() + word.offset, &wanted, sizeof wanted);
    changed = true;
  }
  return changed;
}

LoneKernel::LoneKernel(const Driver& driver, void* graph, const Ranges& captured)
    : driver_(driver), kernel_(driver, only_kernel_of(driver, graph), captured) {
  check_given(captured, [this](Name name) { return kernel_.uses(name); });
}

void LoneKernel::launch(const Addresses& addresses, unsigned blocks, const Stream& stream) {
  kernel_.bind(addresses);
  const KernelNodeParams& its = kernel_.params();
  driver_.check(driver_.cuLaunchKernel(its.func ? its.func : its.kernel, blocks, its.grid_y, its.grid_z, its.block_x,
                                       its.block_y, its.block_z, its.shared_bytes, stream.get(), its.arguments,
                                       nullptr));
}

Graph::Graph(const Driver& driver, void* graph, const Ranges& captured) : driver_(driver) {
  void* clone = nullptr;
  driver.check(driver.cuGraphClone(&clone, graph));
  graph_ = {driver, clone};
  for (void* node : nodes_of(driver, clone)) read(node, captured);
  void* exec = nullptr;
  driver.check(driver.cuGraphInstantiateWithFlags(&exec, clone, 0));
  exec_ = {driver, exec};
}

bool Graph::uses(Name name) const {
  return std::any_of(nodes_.begin(), nodes_.end(), [name](const Node& node) { return node.kernel.uses(name); });
}

Steps make_steps(const Driver& driver, const std::vector<void*>& graphs, const Ranges& captured) {
  Steps steps;
  for (void* graph : graphs) steps.emplace_back(driver, graph, captured);
  check_given(captured, [&](Name name) {
    return std::any_of(steps.begin(), steps.end(), [name](const Graph& graph) { return graph.uses(name); });
  });
  return steps;
}

void Graph::read(void* node, const Ranges& captured) {
  const int type = type_of(driver_, node);
  if (type == kCopyNode || type == kFillNode || type == kEmptyNode) return;
  if (type != kKernelNode) throw DeviceError("a captured graph holds a node of type " + std::to_string(type));
  Kernel kernel(driver_, node, captured);
  if (kernel.has_names()) nodes_.push_back({node, std::move(kernel)});
}

void Graph::bind(const Addresses& addresses) {
  for (Node& its : nodes_) {
    its.stale |= its.kernel.bind(addresses);
    if (!its.stale) continue;
    driver_.check(driver_.cuGraphExecKernelNodeSetParams(exec_.get(), its.node, &its.kernel.params()));
    its.stale = false;
  }
}

}  // namespace expertd::cuda
