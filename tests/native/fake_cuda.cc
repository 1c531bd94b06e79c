// A driver that computes on the host, built to a library of libcuda's kind: what it does when is the test's decision.
//
// Device addresses are the host's plus a bias, so that nobody can use one by mistake. There are several devices, each
// with a context of its own. Work waits in streams until the test steps it. Kernels are functions of this file. What
// would make a serving thread wait is written down as a breach.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/driver.h"

using expertd::cuda::KernelNodeParams;

namespace {

constexpr uint64_t kBias = uint64_t{1} << 60;
constexpr int kInvalidValue = 1, kInvalidContext = 201, kNotReady = 600;

struct Event {
  uint64_t asked = 0, reached = 0;  // records
  float at = 0;
};
struct Work {
  std::string what;
  std::function<bool()> ready;
  std::function<void()> run;
};
struct Context {
  int device;
};
struct Stream {
  int index, device;
  std::deque<Work> queue;
};
using Arguments = std::vector<std::vector<std::byte>>;
struct Node {
  int type = 0, kernel = 0;
  bool by_handle = false;  // a CUkernel instead of a CUfunction
  Arguments arguments;
  std::vector<void*> pointers;
};
struct Graph {
  std::deque<Node> nodes;
};
struct Exec {
  Graph* graph;
  std::map<const Node*, Arguments> arguments;
};
struct Failure {
  std::string name;
  int countdown, code;
};

std::map<uint64_t, size_t> device, pinned;  // begin, bytes
std::map<uint64_t, int> owners;             // of device memory, by its begin
std::set<std::pair<int, int>> peers;        // who reaches whose memory
Context primary[8] = {{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}};
int reachable = 1;
bool zeros = false;  // whether rows without an expert are written, too
std::set<Stream*> streams;
std::set<Event*> events;
std::set<Graph*> graphs;
std::set<Exec*> execs;
std::vector<Graph*> made;  // by the test
std::vector<std::string> calls, breaches;
std::vector<Failure> failures;
int sticky = 0, sticky_device = -1, contexts = 0, next_stream = 0;
bool serving = false, reaches_registered = true;
float clock_ms = 0;
thread_local const Context* entered = nullptr;

// The code that a call is to fail with.
int enter(const char* name, bool waits = false) {
  calls.push_back(name);
  if (serving && waits) breaches.push_back(std::string(name) + " may wait");
  for (Failure& failure : failures)
    if (failure.countdown > 0 && failure.name == name && --failure.countdown == 0) return failure.code;
  return 0;
}

#define ENTER(...)                                                        \
  if (int code = enter(__func__ __VA_OPT__(, ) __VA_ARGS__)) return code; \
  if (!entered) return kInvalidContext;                                   \
  if (sticky && (sticky_device < 0 || entered->device == sticky_device)) return sticky

bool inside(const std::map<uint64_t, size_t>& memory, uint64_t address, size_t bytes) {
  auto after = memory.upper_bound(address);
  if (after == memory.begin()) return false;
  auto [begin, size] = *std::prev(after);
  return address + bytes <= begin + size;
}

void check_copy(const char* name, uint64_t on_device, const void* on_host, size_t bytes) {
  if (!inside(device, on_device - kBias, bytes)) breaches.push_back(std::string(name) + " outside of device memory");
  if (!inside(pinned, reinterpret_cast<uint64_t>(on_host), bytes))
    breaches.push_back(std::string(name) + " of memory that is not pinned, or pinned in two pieces");
}

uint8_t* host(uint64_t address) { return reinterpret_cast<uint8_t*>(address - kBias); }

// Where kernels find memory of the device, or of the host's what is pinned, perhaps in several pieces.
uint8_t* reached(uint64_t address, size_t bytes) {
  if (address >= kBias) return host(address);
  const uint64_t end = address + bytes;
  for (uint64_t at = address; at < end;) {
    auto after = pinned.upper_bound(at);
    const auto piece = after == pinned.begin() ? after : std::prev(after);
    if (piece == pinned.end() || at < piece->first || piece->first + piece->second <= at) {
      breaches.push_back("a kernel works on memory of the host that is not pinned");
      break;
    }
    at = piece->first + piece->second;
  }
  return reinterpret_cast<uint8_t*>(address);
}

template <typename Value>
Value read(const std::vector<std::byte>& bytes, size_t offset = 0) {
  Value value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

// An array as kernels are given it; what pads it looks like nothing in particular.
struct Array {
  uint32_t rank, padding;
  uint64_t address;
  int64_t rows, columns;
};

// pairs[e] = how often e is in ids
void count_pairs(const Arguments& a) {
  Array ids = read<Array>(a[0]);
  const int32_t num_experts = read<int32_t>(a[2]);
  auto chosen = reinterpret_cast<int32_t*>(reached(ids.address, 4 * ids.rows * ids.columns));
  auto pairs = reinterpret_cast<uint32_t*>(reached(read<uint64_t>(a[1]), 4 * num_experts));
  std::fill_n(pairs, num_experts, 0u);
  for (int64_t i = 0; i < ids.rows * ids.columns; i++)
    if (chosen[i] >= 0) pairs[chosen[i]]++;
}

// sums[t, h] = sum over j of weights[t, j] * (value[t, h] * scale[t, h / 128] * up_gate[e] * up_gate_scales[e]
//              + down[e] * down_scales[e]), where e = ids[t, j]; the upper half of its bits for BF16. Of columns from
// the first on, where `sums` begin.
void experts(const Arguments& a) {
  Array ids = read<Array>(a[0]), hidden = read<Array>(a[1]);
  const size_t choices = ids.rows * ids.columns, values = hidden.rows * hidden.columns;
  auto chosen = reinterpret_cast<int32_t*>(reached(ids.address, 4 * choices));
  auto routing = reinterpret_cast<float*>(reached(read<uint64_t>(a[2]), 4 * choices));
  const bool wide = read<uint8_t>(a[6]) != 0;
  const uint64_t scales_at = read<uint64_t>(a[3]);
  const uint8_t* const rows = reached(hidden.address, scales_at ? values : 2 * values);
  const auto scales = scales_at ? reinterpret_cast<float*>(reached(scales_at, values / 32)) : nullptr;
  const float* layer[4];
  for (int i = 0; i < 4; i++) layer[i] = reinterpret_cast<float*>(host(read<uint64_t>(a[5], 8 * i)));
  const int32_t first = read<int32_t>(a[7]), count = read<int32_t>(a[8]);
  uint8_t* const sums = reached(read<uint64_t>(a[4]), (wide ? 4 : 2) * (values - first));
  for (int64_t t = 0; t < ids.rows; t++) {
    bool any = zeros;
    for (int64_t j = 0; j < ids.columns; j++) any |= chosen[t * ids.columns + j] >= 0;
    if (!any) continue;  // so that tests see that such rows are not read, nor written
    for (int64_t h = first; h < first + count; h++) {
      int64_t at = t * hidden.columns + h;
      float value = scales ? rows[at] : reinterpret_cast<const uint16_t*>(rows)[at];
      if (scales) value *= scales[t * (hidden.columns / 128) + h / 128];
      float total = 0;
      for (int64_t j = 0; j < ids.columns; j++) {
        int32_t e = chosen[t * ids.columns + j];
        if (e < 0) continue;
        total += routing[t * ids.columns + j] * (value * layer[0][e] * layer[1][e] + layer[2][e] * layer[3][e]);
      }
      uint32_t bits;
      std::memcpy(&bits, &total, 4);
      if (wide) {
        reinterpret_cast<uint32_t*>(sums)[at - first] = bits;
      } else {
        reinterpret_cast<uint16_t*>(sums)[at - first] = static_cast<uint16_t>(bits >> 16);
      }
    }
  }
}

// The memory of another device that a kernel may not use.
void check_reach(int from, uint64_t address) {
  auto after = owners.upper_bound(address - kBias);
  if (after == owners.begin()) return;
  const int owner = std::prev(after)->second;
  if (owner != from && !peers.count({from, owner})) breaches.push_back("a kernel on another device's memory");
}

// result[r] = parts[0][r] + parts[1][r] + ..., for as many rows as there are blocks
void add_parts(const Arguments& a, unsigned rows, int on) {
  Array result = read<Array>(a[0]);
  auto count = read<int32_t>(a[9]);
  const bool wide = read<uint8_t>(a[10]) != 0;
  if (!inside(device, result.address - kBias, (wide ? 4 : 2) * size_t{rows} * result.columns))
    breaches.push_back("sums are added outside of device memory");
  for (int64_t at = 0; at < int64_t{rows} * result.columns; at++) {
    float total = 0;
    for (int32_t i = 0; i < count; i++) {
      const uint64_t part = read<Array>(a[1 + i]).address;
      if (at == 0) check_reach(on, part);
      total += reinterpret_cast<float*>(host(part))[at];
    }
    uint32_t bits;
    std::memcpy(&bits, &total, 4);
    if (wide) {
      reinterpret_cast<uint32_t*>(host(result.address))[at] = bits;
    } else {
      reinterpret_cast<uint16_t*>(host(result.address))[at] = static_cast<uint16_t>(bits >> 16);
    }
  }
}

void run_kernel(int kernel, const Arguments& arguments) {
  if (kernel == 1) count_pairs(arguments);
  if (kernel == 2) experts(arguments);
}

std::vector<size_t> sizes_of(int kernel) {
  if (kernel == 1) return {sizeof(Array), 8, 4};
  if (kernel == 2) return {sizeof(Array), sizeof(Array), 8, 8, 8, 32, 1, 4, 4};
  if (kernel == 3) {
    std::vector<size_t> sizes(9, sizeof(Array));
    sizes.insert(sizes.end(), {4, 1});
    return sizes;
  }
  return {4, 8};
}

int param_info(void* function, size_t index, size_t* offset, size_t* bytes) {
  auto sizes = sizes_of(static_cast<int>(reinterpret_cast<intptr_t>(function)) & 15);
  if (index >= sizes.size()) return kInvalidValue;
  *offset = 0;
  *bytes = sizes[index];
  return 0;
}

bool step(Stream* stream) {
  if (stream->queue.empty() || !stream->queue.front().ready()) return false;
  Work work = std::move(stream->queue.front());
  stream->queue.pop_front();
  clock_ms += 1;
  work.run();
  return true;
}

void push(
    void* stream, std::string what, std::function<void()> run, std::function<bool()> ready = [] { return true; }) {
  auto to = static_cast<Stream*>(stream);
  if (to->device != entered->device) breaches.push_back(what + " on another device's stream");
  calls.back() += " " + std::to_string(to->index);
  to->queue.push_back({std::move(what), std::move(ready), std::move(run)});
}

template <typename Thing>
int destroy(std::set<Thing*>& things, void* thing) {
  if (!things.erase(static_cast<Thing*>(thing))) return kInvalidValue;
  delete static_cast<Thing*>(thing);
  return 0;
}

void point(Node& node) {
  node.pointers.clear();
  for (auto& argument : node.arguments) node.pointers.push_back(argument.data());
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return enter(__func__); }
int cuDeviceGet(int* out, int ordinal) {
  *out = ordinal;
  return enter(__func__);
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == expertd::cuda::kHostAddressesOfRegistered && reaches_registered;
  return enter(__func__);
}
int cuDevicePrimaryCtxRetain(void** context, int ordinal) {
  if (int code = enter(__func__, true)) return code;
  contexts++;
  *context = &primary[ordinal];
  return 0;
}
int cuDevicePrimaryCtxRelease(int) {
  if (contexts) contexts--;
  return 0;
}
int cuCtxSetCurrent(void* context) {
  if (int code = enter(__func__)) return code;
  entered = static_cast<const Context*>(context);
  return 0;
}
int cuDeviceCanAccessPeer(int* can, int one, int other) {
  *can = reachable && one != other;
  return enter(__func__);
}
int cuCtxEnablePeerAccess(void* peer, unsigned) {
  ENTER(true);
  return peers.insert({entered->device, static_cast<Context*>(peer)->device}).second ? 0 : 704;
}
int cuGetErrorName(int code, const char** name) {
  *name = code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : nullptr;
  return *name ? 0 : kInvalidValue;
}
int cuGetErrorString(int code, const char** text) {
  *text = code == 700 ? "an illegal memory access was encountered" : "out of memory";
  return 0;
}
int cuMemAlloc(uint64_t* memory, size_t bytes) {
  ENTER(true);
  auto address = reinterpret_cast<uint64_t>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  device[address] = bytes;
  owners[address] = entered->device;
  *memory = address + kBias;
  return 0;
}
int cuMemFree(uint64_t memory) {
  enter(__func__, true);
  if (!entered) return kInvalidContext;
  if (!device.erase(memory - kBias)) return kInvalidValue;
  owners.erase(memory - kBias);
  std::free(host(memory));
  return 0;
}
int cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
  ENTER(true);
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  pinned[reinterpret_cast<uint64_t>(*memory)] = bytes;
  return 0;
}
int cuMemFreeHost(void* memory) {
  enter(__func__, true);
  if (!entered) return kInvalidContext;
  if (!pinned.erase(reinterpret_cast<uint64_t>(memory))) return kInvalidValue;
  std::free(memory);
  return 0;
}
int cuMemcpyHtoDAsync(uint64_t to, const void* from, size_t bytes, void* stream) {
  ENTER();
  check_copy(__func__, to, from, bytes);
  push(stream, "in", [=] { std::memcpy(host(to), from, bytes); });
  return 0;
}
int cuMemcpyDtoHAsync(void* to, uint64_t from, size_t bytes, void* stream) {
  ENTER();
  check_copy(__func__, from, to, bytes);
  push(stream, "out", [=] { std::memcpy(to, host(from), bytes); });
  return 0;
}
int cuMemcpyDtoDAsync(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  ENTER();
  for (uint64_t place : {to, from})
    if (!inside(device, place - kBias, bytes)) breaches.push_back(std::string(__func__) + " outside of device memory");
  push(stream, "across", [=] { std::memcpy(host(to), host(from), bytes); });
  return 0;
}
int cuMemcpy2DAsync(const expertd::cuda::Copy2D* copy, void* stream) {
  ENTER();
  if (copy->from_type != expertd::cuda::kUnifiedMemory || copy->to_type != expertd::cuda::kUnifiedMemory)
    breaches.push_back("cuMemcpy2DAsync between unknown kinds of memory");
  for (auto [place, pitch] : {std::pair(copy->from, copy->from_pitch), std::pair(copy->to, copy->to_pitch)})
    if (!inside(device, place - kBias, (copy->height - 1) * pitch + copy->width))
      breaches.push_back("cuMemcpy2DAsync outside of device memory");
  push(stream, "columns", [its = *copy] {
    for (size_t row = 0; row < its.height; row++)
      std::memcpy(host(its.to + row * its.to_pitch), host(its.from + row * its.from_pitch), its.width);
  });
  return 0;
}
int cuStreamCreateWithPriority(void** stream, unsigned flags, int) {
  ENTER(true);
  if (flags != 1) breaches.push_back("a stream that waits for the default one");
  *stream = *streams.insert(new Stream{next_stream++, entered->device, {}}).first;
  return 0;
}
int cuStreamDestroy(void* stream) {
  enter(__func__, true);
  if (!entered) return kInvalidContext;
  return destroy(streams, stream);
}
int cuStreamQuery(void* stream) {
  ENTER();
  return static_cast<Stream*>(stream)->queue.empty() ? 0 : kNotReady;
}
int cuStreamWaitEvent(void* stream, void* event, unsigned) {
  ENTER();
  auto its = static_cast<Event*>(event);
  push(stream, "wait", [] {}, [its, asked = its->asked] { return its->reached >= asked; });
  return 0;
}
int cuStreamWriteValue32(void* stream, uint64_t to, uint32_t value, unsigned) {
  ENTER();
  push(stream, "word", [=] { __atomic_store_n(reinterpret_cast<uint32_t*>(to), value, __ATOMIC_RELEASE); });
  return 0;
}
int cuEventCreate(void** event, unsigned) {
  ENTER(true);
  *event = *events.insert(new Event).first;
  return 0;
}
int cuEventDestroy(void* event) {
  enter(__func__, true);
  if (!entered) return kInvalidContext;
  return destroy(events, event);
}
int cuEventRecord(void* event, void* stream) {
  ENTER();
  auto its = static_cast<Event*>(event);
  push(stream, "event", [its, asked = ++its->asked] {
    if (asked < its->reached) return;  // recorded once more since, on a stream that was faster
    its->reached = asked;
    its->at = clock_ms;
  });
  return 0;
}
int cuEventQuery(void* event) {
  ENTER();
  auto its = static_cast<Event*>(event);
  return its->reached == its->asked ? 0 : kNotReady;
}
int cuEventElapsedTime(float* milliseconds, void* begin, void* end) {
  ENTER();
  auto from = static_cast<Event*>(begin), to = static_cast<Event*>(end);
  if (from->reached != from->asked || to->reached != to->asked) return kNotReady;
  *milliseconds = to->at - from->at;
  return 0;
}
int cuGraphClone(void** clone, void* graph) {
  ENTER(true);
  auto copy = new Graph(*static_cast<Graph*>(graph));
  for (Node& node : copy->nodes) point(node);
  *clone = *graphs.insert(copy).first;
  return 0;
}
int cuGraphDestroy(void* graph) {
  enter(__func__, true);
  if (!entered) return kInvalidContext;
  return destroy(graphs, graph);
}
int cuGraphGetNodes(void* graph, void** nodes, size_t* count) {
  ENTER(true);
  auto its = static_cast<Graph*>(graph);
  if (nodes)
    for (size_t i = 0; i < *count; i++) nodes[i] = &its->nodes[i];
  *count = its->nodes.size();
  return 0;
}
int cuGraphNodeGetType(void* node, int* type) {
  ENTER(true);
  *type = static_cast<Node*>(node)->type;
  return 0;
}
int cuGraphKernelNodeGetParams(void* node, KernelNodeParams* params) {
  ENTER(true);
  auto its = static_cast<Node*>(node);
  auto handle = reinterpret_cast<void*>(static_cast<intptr_t>(its->kernel + 16));
  *params = {};
  (its->by_handle ? params->kernel : params->func) = handle;
  params->arguments = its->pointers.data();
  return 0;
}
int cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long) {
  ENTER(true);
  auto its = static_cast<Graph*>(graph);
  auto made = new Exec{its, {}};
  for (Node& node : its->nodes) made->arguments[&node] = node.arguments;
  *exec = *execs.insert(made).first;
  return 0;
}
int cuGraphExecDestroy(void* exec) {
  enter(__func__, true);
  if (!entered) return kInvalidContext;
  return destroy(execs, exec);
}
int cuGraphExecKernelNodeSetParams(void* exec, void* node, const KernelNodeParams* params) {
  ENTER();
  auto& arguments = static_cast<Exec*>(exec)->arguments[static_cast<Node*>(node)];
  for (size_t i = 0; i < arguments.size(); i++)
    std::memcpy(arguments[i].data(), params->arguments[i], arguments[i].size());
  return 0;
}
int cuGraphUpload(void*, void*) {
  ENTER(true);
  return 0;
}
int cuGraphLaunch(void* exec, void* stream) {
  ENTER();
  auto its = static_cast<Exec*>(exec);
  std::vector<std::pair<int, Arguments>> kernels;
  for (Node& node : its->graph->nodes)
    if (node.type == 0) kernels.emplace_back(node.kernel, its->arguments[&node]);
  push(stream, "graph", [kernels] {
    for (auto& [kernel, arguments] : kernels) run_kernel(kernel, arguments);
  });
  return 0;
}
int cuLaunchKernel(void* function, unsigned grid_x, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                   void* stream, void** given, void**) {
  ENTER();
  const int kernel = static_cast<int>(reinterpret_cast<intptr_t>(function)) & 15;
  Arguments arguments;
  for (const size_t bytes : sizes_of(kernel)) {
    auto begin = static_cast<const std::byte*>(given[arguments.size()]);
    arguments.emplace_back(begin, begin + bytes);
  }
  if (kernel != 3) return kInvalidValue;
  push(stream, "kernel", [=, on = static_cast<Stream*>(stream)->device] { add_parts(arguments, grid_x, on); });
  return 0;
}
int cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* bytes) {
  ENTER(true);
  return param_info(function, index, offset, bytes);
}
int cuKernelGetParamInfo(void* kernel, size_t index, size_t* offset, size_t* bytes) {
  ENTER(true);
  return param_info(kernel, index, offset, bytes);
}

#ifndef OLD_DRIVER
int cuGetProcAddress_v2(const char* symbol, void** function, int version, uint64_t, int* status) {
  *status = 0;
  if (version != expertd::cuda::kDriverVersion) return kInvalidValue;
#define FIND(name, arguments) \
  if (!std::strcmp(symbol, #name)) *function = reinterpret_cast<void*>(&name);
  EXPERTD_DRIVER_CALLS(FIND)
  return *function ? 0 : kInvalidValue;
}
#endif

// What tests say and ask.

// Forgets everything: what a test that failed has left too.
void fake_reset() {
  owners.clear(), peers.clear();
  reachable = 1, zeros = false, sticky_device = -1;
  device.clear(), pinned.clear(), streams.clear(), events.clear(), graphs.clear(), execs.clear(), made.clear();
  contexts = 0;
  calls.clear();
  breaches.clear();
  failures.clear();
  sticky = 0;
  serving = false;
  reaches_registered = true;
  next_stream = 0;
  clock_ms = 0;
}
// All that waits in the streams is gone.
void fake_drop() {
  for (Stream* stream : streams) stream->queue.clear();
}
void fake_serving(int yes) { serving = yes; }
void fake_reaches_registered(int yes) { reaches_registered = yes; }
void fake_fail(const char* name, int nth, int code) { failures.push_back({name, nth, code}); }
void fake_forget_failures() { failures.clear(); }
void fake_sticky(int code) { sticky = code; }
// Of that device's context alone.
void fake_sticky_device(int index) { sticky_device = index; }
void fake_reachable(int yes) { reachable = yes; }
void fake_zeros(int yes) { zeros = yes; }
// Does the next piece of work of a stream; whether there was one that is not waiting.
int fake_step(int index) {
  for (Stream* stream : streams)
    if (stream->index == index) return step(stream);
  return 0;
}
void fake_run() {
  for (bool moved = true; moved;) {
    moved = false;
    for (Stream* stream : streams)
      while (step(stream)) moved = true;
  }
}
// What waits in a stream, and what was called since the last question.
const char* fake_waiting(int index) {
  static std::string text;
  text.clear();
  for (Stream* stream : streams)
    if (stream->index == index)
      for (Work& work : stream->queue) text += work.what + " ";
  return text.c_str();
}
const char* fake_calls() {
  static std::string text;
  text.clear();
  for (auto& call : calls) text += call + "\n";
  calls.clear();
  return text.c_str();
}
const char* fake_breaches() {
  static std::string text;
  text.clear();
  for (auto& breach : breaches) text += breach + "\n";
  return text.c_str();
}
// Memory, streams, events, graphs and contexts that exist.
int fake_alive() {
  return static_cast<int>(device.size() + pinned.size() + streams.size() + events.size() + graphs.size() +
                          execs.size()) +
         contexts;
}
void fake_register(void* memory, size_t bytes) { pinned[reinterpret_cast<uint64_t>(memory)] = bytes; }
void fake_unregister(void* memory) { pinned.erase(reinterpret_cast<uint64_t>(memory)); }
uint64_t fake_device_floats(const float* values, size_t count) {
  auto memory = static_cast<float*>(std::malloc(4 * count));
  std::copy_n(values, count, memory);
  return reinterpret_cast<uint64_t>(memory) + kBias;
}
void fake_device_floats_free(uint64_t memory) { std::free(host(memory)); }
// Memory on the device of a caller; `bytes` may be odd.
uint64_t fake_share(size_t bytes) {
  auto memory = static_cast<char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  device[reinterpret_cast<uint64_t>(memory)] = bytes;
  return reinterpret_cast<uint64_t>(memory) + kBias;
}
void fake_unshare(uint64_t memory) {
  device.erase(memory - kBias);
  std::free(host(memory));
}
void* fake_device_bytes(uint64_t memory) { return host(memory); }
// A captured graph: a kernel without interest, one that counts pairs, one that computes. `odd`: a node's type, -1 none.
// Of several steps only the first counts pairs, and each computes its share of the columns.
void* fake_graph(uint64_t ids, uint64_t weights, uint64_t hidden, uint64_t scales, uint64_t pairs, uint64_t sums,
                 const uint64_t* layer, int tokens, int width, int columns, int num_experts, int wide, int odd,
                 int step, int steps) {
  auto graph = new Graph;
  auto bytes = [](const auto& value) {
    auto begin = reinterpret_cast<const std::byte*>(&value);
    return std::vector<std::byte>(begin, begin + sizeof value);
  };
  Array chosen{2, 0xdead, ids, tokens, width}, rows{2, 0xbeef, hidden, tokens, columns};
  uint64_t four[4];
  std::copy_n(layer, 4, four);
  graph->nodes.push_back({0, 0, false, {bytes(int32_t{7}), bytes(uint64_t{42})}, {}});
  if (step == 0) graph->nodes.push_back({0, 1, true, {bytes(chosen), bytes(pairs), bytes(num_experts)}, {}});
  const int32_t share = columns / steps, first = step * share;
  sums += uint64_t{static_cast<uint32_t>(first)} * (wide ? 4 : 2);
  graph->nodes.push_back({0,
                          2,
                          false,
                          {bytes(chosen), bytes(rows), bytes(weights), bytes(scales), bytes(sums), bytes(four),
                           bytes(static_cast<uint8_t>(wide)), bytes(first), bytes(share)},
                          {}});
  if (odd >= 0) graph->nodes.push_back({odd, 0, false, {}, {}});
  for (Node& node : graph->nodes) point(node);
  made.push_back(graph);
  return graph;
}
// A captured graph that adds up parts.
void* fake_adder(uint64_t result, const uint64_t* parts, int count, int columns, int wide) {
  auto graph = new Graph;
  auto bytes = [](const auto& value) {
    auto begin = reinterpret_cast<const std::byte*>(&value);
    return std::vector<std::byte>(begin, begin + sizeof value);
  };
  Arguments arguments = {bytes(Array{2, 0xfeed, result, 1, columns})};
  for (int i = 0; i < 8; i++) arguments.push_back(bytes(Array{2, 0xf00d, parts[i < count ? i : 0], 1, columns}));
  arguments.push_back(bytes(int32_t{count}));
  arguments.push_back(bytes(static_cast<uint8_t>(wide)));
  graph->nodes.push_back({0, 3, false, arguments, {}});
  for (Node& node : graph->nodes) point(node);
  made.push_back(graph);
  return graph;
}
// The test's graphs go, as Python's do; the ledger has its own.
void fake_forget_graphs() {
  for (Graph* graph : made) {
    for (Node& node : graph->nodes) std::fill(node.pointers.begin(), node.pointers.end(), nullptr);
    delete graph;
  }
  made.clear();
}
}
