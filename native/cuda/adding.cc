#include "cuda/adding.h"

#include <algorithm>
#include <bit>
#include <string>

namespace expertd::cuda {

namespace {

constexpr uint64_t kQueryNs = 10'000'000;         // between two questions about what is late
constexpr uint64_t kFirstExpectedNs = 1'000'000;  // of sizes that were never added

}  // namespace

std::shared_ptr<PeerAdder> PeerAdder::make(const std::vector<std::shared_ptr<Executor>>& devices) {
  std::vector<std::shared_ptr<CudaExecutor>> gpus;
  for (const auto& device : devices) gpus.push_back(std::dynamic_pointer_cast<CudaExecutor>(device));
  if (gpus.size() > kMostParts || std::find(gpus.begin(), gpus.end(), nullptr) != gpus.end()) return nullptr;
  const auto each = [&](auto work) {
    for (const auto& one : gpus)
      for (const auto& other : gpus)
        if (one != other && !work(*one, *other)) return false;
    return true;
  };
  const bool reach = each([](CudaExecutor& one, CudaExecutor& other) {
    int can = 0;
    one.driver().check(one.driver().cuDeviceCanAccessPeer(&can, one.context().device(), other.context().device()));
    return can != 0;
  });
  if (!reach) return nullptr;
  each([](CudaExecutor& one, CudaExecutor& other) {
    one.enter();
    const int code = one.driver().cuCtxEnablePeerAccess(other.context().get(), 0);
    if (code != kCudaPeerAccessEnabled) one.driver().check(code);
    return true;
  });
  gpus.front()->enter();  // what a thread that uses devices otherwise has
  return std::shared_ptr<PeerAdder>(new PeerAdder(std::move(gpus)));
}

PeerAdder::~PeerAdder() {
  if (!under_way_.empty()) new std::vector(std::move(devices_));
}

bool PeerAdder::takes(const Batch& batch, size_t devices) const {
  return std::all_of(devices_.begin(), devices_.end(),
                     [&](const auto& device) { return device->adder(devices, batch.first().sums_dtype()) != nullptr; });
}

void PeerAdder::start(Batch* whole, std::vector<std::pair<size_t, const Batch*>> parts, uint64_t now_ns) {
  Adding& adding = under_way_.emplace_back(whole, std::vector<Share>{}, now_ns, now_ns + kQueryNs);
  for (const auto& [device, part] : parts) adding.shares.push_back({device, part->bay});
  const uint64_t count = parts.size();
  for (size_t i = 0; i < count && !whole->failure; i++) {
    const auto row = [&](uint64_t share) { return static_cast<uint32_t>(whole->tokens * share / count); };
    if (row(i) < row(i + 1))
      launch(adding, adding.shares[i], row(i), row(i + 1));
    else
      adding.shares[i].ended = true;
  }
}

void PeerAdder::launch(Adding& adding, Share& share, uint32_t first, uint32_t end) {
  CudaExecutor& gpu = *devices_[share.device];
  std::vector<const Bay*> bays;
  for (const Share& one : adding.shares) bays.push_back(&devices_[one.device]->bay(one.bay));
  try {
    gpu.enter();
    share.launched = true;
    gpu.bay(share.bay).add(*adding.whole, first, end, bays, *gpu.adder(bays.size(), adding.whole->first().sums_dtype()),
                           gpu.options().piece_bytes, gpu.copier());
  } catch (const DeviceError& error) {
    fail(adding, share.device, error.what());
  }
}

void PeerAdder::fail(Adding& adding, size_t device, std::string text) {
  if (adding.whole->failure) return;
  adding.whole->failure = Refusal{Code::kInternal, std::move(text)};
  adding.failed = device;
}

bool PeerAdder::advance(Adding& adding, uint64_t now_ns) {
  const bool late = now_ns >= adding.query_ns;
  if (late) adding.query_ns = now_ns + kQueryNs;
  bool over = true;
  for (Share& share : adding.shares) {
    if (!share.launched || share.ended) continue;
    CudaExecutor& gpu = *devices_[share.device];
    Bay& bay = gpu.bay(share.bay);
    bay.fetch();
    if (bay.ended()) {
      share.ended = !bay.copying();
    } else if (late) {
      gpu.driver().cuCtxSetCurrent(gpu.context().get());
      const int code = bay.query();
      // Without its end word: a launch failed, or the device.
      if (code != kCudaNotReady && !bay.ended()) {
        fail(adding, share.device,
             code == kCudaSuccess ? "the device failed: it added without an end"
                                  : gpu.driver().describe(code) + " (while it added)");
        share.ended = !bay.copying();
      }
    }
    over = over && share.ended;
  }
  return over;
}

Batch* PeerAdder::poll(uint64_t now_ns, size_t* failed_device) {
  for (auto adding = under_way_.begin(); adding != under_way_.end(); ++adding) {
    if (!advance(*adding, now_ns)) continue;
    Batch* const whole = adding->whole;
    *failed_device = adding->failed;
    double longest = 0;
    for (const Share& share : adding->shares) {
      double seconds = 0;
      CudaExecutor& gpu = *devices_[share.device];
      gpu.driver().cuCtxSetCurrent(gpu.context().get());
      if (share.launched && !whole->failure && gpu.bay(share.bay).read_added(&seconds))
        longest = std::max(longest, seconds);
    }
    whole->seconds.copy_out = longest;
    if (longest > 0) took_ns_[std::bit_width(whole->tokens)] = static_cast<uint64_t>(longest * 1e9);
    under_way_.erase(adding);
    return whole;
  }
  return nullptr;
}

uint64_t PeerAdder::expected_ns(const Batch& whole) const {
  const auto found = took_ns_.find(std::bit_width(whole.tokens));
  return found == took_ns_.end() ? kFirstExpectedNs : found->second;
}

uint64_t PeerAdder::due_ns() const {
  uint64_t due = 0;
  for (const Adding& adding : under_way_) {
    const uint64_t its = adding.started_ns + expected_ns(*adding.whole);
    if (!due || its < due) due = its;
  }
  return due;
}

void PeerAdder::forsake(size_t device) {
  for (Adding& adding : under_way_) {
    for (Share& share : adding.shares) {
      if (share.device != device || share.ended) continue;
      share.ended = true;
      fail(adding, device, "the device hangs (while it added)");
    }
  }
}

void PeerAdder::release(size_t device, const Batch& part) { devices_[device]->release(part.bay); }

}  // namespace expertd::cuda
