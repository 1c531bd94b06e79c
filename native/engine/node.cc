#include "engine/node.h"

#include <algorithm>
#include <bit>
#include <new>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "base/clock.h"
#include "base/pool.h"
#include "tokens/sum.h"

namespace expertd {
namespace {

// Sums up to this are added on the engine's thread.
constexpr size_t kInPlaceBytes = 256 << 10;
constexpr size_t kAlignment = 64;

uint64_t bit(size_t device) { return uint64_t{1} << device; }

std::string name_of(size_t device) { return "device " + std::to_string(device); }

Format format_of(Dtype dtype) { return dtype == Dtype::kBFloat16 ? Format::bfloat16 : Format::float32; }

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

void widen(DeviceSeconds* whole, const DeviceSeconds& part) {
  whole->copy_in = std::max(whole->copy_in, part.copy_in);
  whole->compute = std::max(whole->compute, part.compute);
  whole->copy_out = std::max(whole->copy_out, part.copy_out);
  whole->measured = whole->measured && part.measured;
}

}  // namespace

const Home* home_of(const OwnedLayer& owned, uint32_t expert, uint32_t weight, uint64_t out_of_use) {
  const std::vector<Home>& homes = owned.homes[expert];
  const auto left = [&](const Home& home) { return !(out_of_use >> home.device & 1); };
  const auto count = static_cast<uint32_t>(std::count_if(homes.begin(), homes.end(), left));
  if (count == 0) return nullptr;
  // Weights differ in their lower bits, if at all; the upper ones of the product depend on all of them.
  uint32_t skip = (weight * 0x9E3779B1u >> 16) % count;
  for (const Home& home : homes)
    if (left(home) && skip-- == 0) return &home;
  return nullptr;
}

// What a device computes of one job of a batch.
struct NodeExecutor::Piece {
  std::shared_ptr<Job> whole;
  std::vector<int32_t> ids;   // [tokens, top_k], the device's own; -1 for experts of others
  std::vector<int64_t> rows;  // that have an id
  std::byte* sums = nullptr;
};

class NodeExecutor::PieceJob final : public Job {
 public:
  // `dtype`: of the sums. `memory`: what they are in, or null for the job's own place.
  PieceJob(Piece& piece, const OwnedLayer& owned, Dtype dtype, std::shared_ptr<Sums> memory)
      : whole_(piece.whole), memory_(std::move(memory)) {
    const Admitted& its = whole_->request;
    // `whole_` keeps it, on a device that hangs for ever.
    request = {.placement = PlacementPtr(PlacementPtr(), its.placement.get()),
               .owned = &owned,
               .request_id = its.request_id,
               .layer = its.layer,
               .tokens = its.tokens,
               .top_k = its.top_k,
               .hidden_dtype = its.hidden_dtype,
               .reply_dtype = dtype,
               .hidden = its.hidden,
               .scales = its.scales,
               .weights = its.weights,
               .local_ids = std::move(piece.ids),
               .pairs = {}};
    reach = whole_->reach;
    own_sums = memory_ != nullptr || its.rounds();
    sums = reply = piece.sums;
  }

  void make_room() override {}
  void complete() override {}
  bool is_slow() const override { return false; }
  void settle(Outcome) override {}

 private:
  const std::shared_ptr<Job> whole_;  // whose memory is read
  const std::shared_ptr<Sums> memory_;
};

struct NodeExecutor::Run {
  std::unique_ptr<Batch> batch;                                 // null: it was given up while devices added
  std::vector<std::vector<Piece>> pieces;                       // by device
  std::vector<std::pair<size_t, std::unique_ptr<Batch>>> kept;  // parts whose sums devices have
  size_t pending = 0;                                           // parts that devices have not given back
  uint64_t out_of_use = 0;                                      // bits of devices that failed
  bool again = false;                                           // without them
  bool alone = false;                                           // one device has all of it
  bool on_devices = false;                                      // its sums are added where they are
  const Batch* whole = nullptr;                                 // once that has begun
  DeviceSeconds seconds;
  std::vector<uint32_t> pairs;
  std::optional<Refusal> failure;
  std::string fault;
  std::atomic<bool> added{false};
};

NodeExecutor::NodeExecutor(std::vector<std::shared_ptr<Executor>> devices, std::shared_ptr<Failpoints> failpoints,
                           std::shared_ptr<Adder> adder)
    : devices_(std::move(devices)),
      failpoints_(std::move(failpoints)),
      adder_(std::move(adder)),
      records_(devices_.size()),
      under_way_(devices_.size()) {
  if (devices_.empty() || devices_.size() > kMostDevices)
    throw std::invalid_argument(std::to_string(devices_.size()) + " devices: a node has 1 to " +
                                std::to_string(kMostDevices));
  for (const auto& device : devices_) device->on_done([this] { wake(); });
}

NodeExecutor::~NodeExecutor() {
  for (const auto& device : devices_) device->on_done(nullptr);
}

size_t NodeExecutor::depth() const {
  size_t depth = SIZE_MAX;
  for (const auto& device : devices_) depth = std::min(depth, device->depth());
  return depth;
}

bool NodeExecutor::has_express() const {
  return std::all_of(devices_.begin(), devices_.end(), [](const auto& device) { return device->has_express(); });
}

uint64_t NodeExecutor::due_ns() const {
  uint64_t due = 0;
  for (const auto& device : devices_) {
    const uint64_t its = device->due_ns();
    if (its && (!due || its < due)) due = its;
  }
  const uint64_t its = adder_ ? adder_->due_ns() : 0;
  return its && (!due || its < due) ? its : due;
}

void NodeExecutor::start(std::unique_ptr<Batch> batch, uint64_t now_ns) {
  auto run = std::make_shared<Run>();
  run->batch = std::move(batch);
  spread(std::move(run), now_ns);
}

bool NodeExecutor::divide(const Batch& batch, uint64_t out_of_use, std::vector<std::vector<Piece>>* pieces) const {
  const OwnedLayer& owned = *batch.first().owned;
  for (const auto& job : batch.jobs) {
    const Admitted& request = job->request;
    std::vector<Piece> its(devices_.size());
    for (uint32_t row = 0, at = 0; row < request.tokens; ++row) {
      for (uint32_t choice = 0; choice < request.top_k; ++choice, ++at) {
        const int32_t expert = request.local_ids[at];
        if (expert < 0) continue;
        const auto weight = load<uint32_t>(reinterpret_cast<const std::byte*>(request.weights.data()), at);
        const Home* home = home_of(owned, static_cast<uint32_t>(expert), weight, out_of_use);
        if (!home) return false;
        Piece& piece = its[home->device];
        if (piece.ids.empty()) piece.ids.assign(request.local_ids.size(), -1);
        piece.ids[at] = home->local;
        if (piece.rows.empty() || piece.rows.back() != row) piece.rows.push_back(row);
      }
    }
    for (size_t device = 0; device < its.size(); ++device) {
      if (its[device].rows.empty()) continue;
      its[device].whole = job;
      (*pieces)[device].push_back(std::move(its[device]));
    }
  }
  return true;
}

void NodeExecutor::spread(std::shared_ptr<Run> run, uint64_t now_ns) {
  const Batch& batch = *run->batch;
  run->pieces.assign(devices_.size(), {});
  run->pairs.assign(batch.first().pairs.size(), 0);
  run->seconds = {};
  run->again = false;
  if (!divide(batch, run->out_of_use | lost_.load(), &run->pieces)) {
    if (!run->failure)
      run->failure = Refusal{Code::kAborted, "layer " + std::to_string(batch.first().layer) +
                                                 ": a device that had its experts is lost; ask GetShard"};
    return finish(std::move(run));
  }
  run->failure.reset();
  const auto wanted = std::count_if(run->pieces.begin(), run->pieces.end(), [](auto& its) { return !its.empty(); });
  run->alone = wanted < 2;
  run->on_devices = !run->alone && adder_ && adder_->takes(batch, static_cast<size_t>(wanted));
  if (run->alone)
    for (const auto& job : batch.jobs)  // those that want nothing
      if (std::all_of(job->request.pairs.begin(), job->request.pairs.end(), [](uint32_t n) { return n == 0; }))
        std::fill_n(job->sums, job->request.computed_bytes(), std::byte{0});
  std::vector<std::pair<size_t, std::unique_ptr<Batch>>> dead;
  for (size_t device = 0; device < devices_.size(); ++device) {
    if (run->pieces[device].empty()) continue;
    auto part = part_of(*run, device);
    under_way_[device].emplace(part.get(), run);
    ++run->pending;
    if (dies(device))
      dead.emplace_back(device, std::move(part));
    else
      devices_[device]->start(std::move(part), now_ns);
  }
  for (auto& [device, part] : dead) {
    part->device_failed = true;
    part->failure = Refusal{Code::kInternal, "the device failed: failpoint lost_device"};
    take_back(device, std::move(part), now_ns);
  }
}

std::unique_ptr<Batch> NodeExecutor::part_of(Run& run, size_t device) {
  const Batch& batch = *run.batch;
  std::vector<Piece>& pieces = run.pieces[device];
  if (run.on_devices) {
    // Each row is in the same place on every device.
    std::vector<Piece> all;
    for (size_t i = 0, next = 0; i < batch.jobs.size(); ++i) {
      if (next < pieces.size() && pieces[next].whole == batch.jobs[i])
        all.push_back(std::move(pieces[next++]));
      else
        all.push_back({batch.jobs[i], std::vector<int32_t>(batch.jobs[i]->request.local_ids.size(), -1), {}});
    }
    pieces = std::move(all);
  }
  const auto bytes_of = [](const Piece& piece) {
    return aligned(piece.whole->request.computed_bytes(Dtype::kFloat32));
  };
  std::shared_ptr<Sums> memory;
  if (!run.alone && !run.on_devices) {
    size_t bytes = 0;
    for (const Piece& piece : pieces) bytes += bytes_of(piece);
    memory = room(bytes);
  }
  auto part = std::make_unique<Batch>();
  std::byte* place = memory ? memory->memory.get() : nullptr;
  const Dtype dtype = run.alone ? batch.first().sums_dtype() : Dtype::kFloat32;
  for (Piece& piece : pieces) {
    piece.sums = run.alone ? piece.whole->sums : place;
    if (memory) place += bytes_of(piece);
    part->tokens += piece.whole->tokens();
    part->jobs.push_back(std::make_shared<PieceJob>(piece, batch.first().owned->devices[device], dtype, memory));
  }
  part->started_ns = batch.started_ns;
  part->alone = batch.alone;
  part->express = batch.express;
  part->keeps_sums = run.on_devices;
  return part;
}

bool NodeExecutor::dies(size_t device) {
  const uint64_t sound = ~(lost_.load() | killed_.load()) & (~uint64_t{0} >> (kMostDevices - devices_.size()));
  // Never the last one.
  if (failpoints_ && std::popcount(sound) > 1 && (sound & bit(device)) && failpoints_->strikes("lost_device"))
    killed_ |= bit(device);
  return killed_.load() & bit(device);
}

std::shared_ptr<NodeExecutor::Sums> NodeExecutor::room(size_t bytes) {
  // Used by nobody else, and the least that is large enough.
  std::shared_ptr<Sums>* best = nullptr;
  for (auto& sums : sums_)
    if (sums.use_count() == 1 &&
        (!best || (sums->bytes >= bytes && ((*best)->bytes < bytes || sums->bytes < (*best)->bytes))))
      best = &sums;
  if (!best) best = &sums_.emplace_back(std::make_shared<Sums>());
  if ((*best)->bytes < bytes) {
    (*best)->memory.reset();
    (*best)->memory.reset(new std::byte[bytes]);
    (*best)->bytes = bytes;
  }
  return *best;
}

std::unique_ptr<Batch> NodeExecutor::poll(uint64_t now_ns) {
  for (uint64_t left = hanging_.load() & ~stranded_; left; left &= left - 1) strand(std::countr_zero(left));
  for (size_t device = 0; device < devices_.size(); ++device)
    while (auto part = devices_[device]->poll(now_ns)) take_back(device, std::move(part), now_ns);
  size_t failed = 0;
  while (Batch* whole = adder_ ? adder_->poll(now_ns, &failed) : nullptr) take_added(whole, failed, now_ns);
  for (size_t i = 0; i < adding_.size();) {
    if (!adding_[i]->added.load(std::memory_order_acquire)) {
      ++i;
      continue;
    }
    std::swap(adding_[i], adding_.back());
    finish(std::move(adding_.back()));
    adding_.pop_back();
  }
  if (finished_.empty()) return nullptr;
  auto batch = std::move(finished_.front());
  finished_.pop_front();
  return batch;
}

void NodeExecutor::take_added(Batch* whole, size_t failed, uint64_t now_ns) {
  const auto found = std::find_if(adding_.begin(), adding_.end(), [&](auto& run) { return run->whole == whole; });
  const std::shared_ptr<Run> run = std::move(*found);
  adding_.erase(found);
  release(*run);
  if (!run->batch) return;
  if (whole->failure) {
    {
      const std::lock_guard lock(mutex_);
      ++records_[failed].failures;
    }
    fail(*run, failed, *std::exchange(whole->failure, std::nullopt));
    return settle(run, now_ns);
  }
  run->seconds.copy_out += whole->seconds.copy_out;
  adding_seconds_.fetch_add(whole->seconds.copy_out, std::memory_order_relaxed);
  finish(run);
}

void NodeExecutor::fail(Run& run, size_t device, const Refusal& refusal) {
  run.again = true;
  run.out_of_use |= bit(device);
  run.fault = name_of(device) + ": " + refusal.text;
  run.failure = Refusal{refusal.code, run.fault};
}

void NodeExecutor::release(Run& run) {
  for (auto& [device, part] : std::exchange(run.kept, {}))
    if (!(stranded_ >> device & 1)) adder_->release(device, *part);
}

void NodeExecutor::take_back(size_t device, std::unique_ptr<Batch> part, uint64_t now_ns) {
  const auto found = under_way_[device].find(part.get());
  if (found == under_way_[device].end()) {  // of a batch that was given up
    if (part->keeps_sums && !part->failure) adder_->release(device, *part);
    return;
  }
  const std::shared_ptr<Run> run = std::move(found->second);
  under_way_[device].erase(found);
  {
    const std::lock_guard lock(mutex_);
    Record& record = records_[device];
    ++record.batches;
    record.failures += part->failure.has_value();
    if (!part->failure) {
      record.copy_in += part->seconds.copy_in;
      record.compute += part->seconds.compute;
      record.copy_out += part->seconds.copy_out;
    }
  }
  if (part->failure && part->device_failed) {
    fail(*run, device, *part->failure);
  } else if (part->failure) {
    run->failure = Refusal{part->failure->code, name_of(device) + ": " + part->failure->text};
  } else {
    const std::vector<uint32_t>& experts = run->batch->first().owned->devices[device].experts;
    // A device may have room for more experts than it has.
    for (size_t local = 0; local < std::min(experts.size(), part->pairs.size()); ++local)
      run->pairs[experts[local]] += part->pairs[local];
    widen(&run->seconds, part->seconds);
    if (part->keeps_sums) run->kept.emplace_back(device, std::move(part));
  }
  part.reset();
  if (--run->pending == 0) settle(run, now_ns);
}

void NodeExecutor::settle(const std::shared_ptr<Run>& run, uint64_t now_ns) {
  if (run->again || run->failure) release(*run);
  if (run->again) return spread(run, now_ns);
  if (run->failure || run->alone) return finish(run);
  add(run, now_ns);
}

void NodeExecutor::add(const std::shared_ptr<Run>& run, uint64_t now_ns) {
  if (!run->on_devices) return add_on_host(run);
  adding_.push_back(run);
  run->whole = run->batch.get();
  std::vector<std::pair<size_t, const Batch*>> parts;
  std::sort(run->kept.begin(), run->kept.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  for (const auto& [device, part] : run->kept) parts.emplace_back(device, part.get());
  adder_->start(run->batch.get(), std::move(parts), now_ns);
}

void NodeExecutor::add_on_host(const std::shared_ptr<Run>& run) {
  const auto work = [run, this] {
    const int64_t began = monotonic_ns();
    const uint32_t width = run->batch->first().placement->hidden_size;
    std::vector<size_t> next(devices_.size(), 0);
    for (const auto& job : run->batch->jobs) {
      const Admitted& request = job->request;
      std::vector<Part> parts;
      for (size_t device = 0; device < devices_.size(); ++device) {
        if (next[device] == run->pieces[device].size()) continue;
        const Piece& piece = run->pieces[device][next[device]];
        if (piece.whole != job) continue;
        ++next[device];
        // Rows that it had nothing to do for are not read.
        for (size_t begin = 0, end; begin < piece.rows.size(); begin = end) {
          for (end = begin + 1; end < piece.rows.size() && piece.rows[end] == piece.rows[end - 1] + 1; ++end) continue;
          const std::byte* from = piece.sums + static_cast<size_t>(piece.rows[begin]) * 4 * width;
          parts.push_back({{from, 4 * static_cast<ptrdiff_t>(width)},
                           Format::float32,
                           end - begin,
                           piece.rows.data() + begin,
                           nullptr});
        }
      }
      const Format format = format_of(request.sums_dtype());
      sum(parts, request.tokens, width, format, {job->sums, static_cast<ptrdiff_t>(width * size_of(format))});
    }
    const double seconds = static_cast<double>(monotonic_ns() - began) * 1e-9;
    run->seconds.copy_out += seconds;
    adding_seconds_.fetch_add(seconds, std::memory_order_relaxed);
  };
  uint64_t bytes = 0;
  for (const auto& job : run->batch->jobs) bytes += job->request.computed_bytes();
  if (bytes <= kInPlaceBytes) {
    work();
    return finish(run);
  }
  adding_.push_back(run);
  Pool::of_process().post([work, run, self = shared_from_this()] {
    work();
    run->added.store(true, std::memory_order_release);
    self->wake();
  });
}

void NodeExecutor::finish(std::shared_ptr<Run> run) {
  Batch& batch = *run->batch;
  batch.failure = std::move(run->failure);
  batch.device_failed = !run->fault.empty();
  batch.fault = std::move(run->fault);
  batch.pairs = std::move(run->pairs);
  batch.seconds = run->seconds;
  finished_.push_back(std::move(run->batch));
}

void NodeExecutor::lose(size_t device, bool hangs) {
  lost_ |= bit(device);
  if (hangs) hanging_ |= bit(device);
  wake();
}

void NodeExecutor::strand(size_t device) {
  stranded_ |= bit(device);
  const auto give_up = [&](const std::shared_ptr<Run>& run) {
    run->failure = Refusal{Code::kUnavailable, name_of(device) + " is lost; use another replica"};
    run->batch->stranded = true;
    finish(run);
  };
  for (auto& [part, run] : std::exchange(under_way_[device], {})) {
    for (auto& others : under_way_) std::erase_if(others, [&](const auto& one) { return one.second == run; });
    release(*run);
    give_up(run);
  }
  if (adder_) adder_->forsake(device);
  // What others still add of those comes back, and is released, later.
  for (const auto& run : adding_)
    if (run->batch && std::any_of(run->kept.begin(), run->kept.end(), [&](auto& its) { return its.first == device; }))
      give_up(run);
}

void NodeExecutor::check(size_t device) const {
  if (killed_.load() >> device & 1) throw std::runtime_error("failpoint lost_device");
}

std::vector<NodeExecutor::Record> NodeExecutor::records() const {
  const std::lock_guard lock(mutex_);
  return records_;
}

}  // namespace expertd
