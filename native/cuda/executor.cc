#include "cuda/executor.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

namespace expertd::cuda {

namespace {

constexpr size_t kInPlaceBytes = 256 << 10;       // copies up to this are made at once
constexpr uint64_t kQueryNs = 10'000'000;         // between two questions about a batch that is late
constexpr uint64_t kFirstExpectedNs = 5'000'000;  // of a batch whose kind was never launched

double seconds(uint64_t begin_ns, uint64_t end_ns) { return static_cast<double>(end_ns - begin_ns) * 1e-9; }

}  // namespace

CudaExecutor::CudaExecutor(const Driver& driver, Options options, Copier* copier)
    : driver_(driver),
      options_(std::move(options)),
      copier_(copier),
      context_(driver, options_.device),
      streams_(driver),
      busy_(options_.depth, false) {
  for (size_t i = 0; i < options_.depth; i++)
    bays_.emplace_back(driver, streams_, layout(options_.classes.back(), kBf16, kFp32));
}

CudaExecutor::~CudaExecutor() {
  driver_.cuCtxSetCurrent(context_.get());
  for (Run& run : runs_)
    if (!run.copied || !streams_.idle(driver_)) bay_of(run).abandon();
  // The copier may yet tell the end of its work.
  if (!runs_.empty()) new std::list<Run>(std::move(runs_));
}

Layout CudaExecutor::layout(uint32_t tokens, uint8_t hidden_dtype, uint8_t reply_dtype) const {
  return {options_.shape, tokens, hidden_dtype, reply_dtype};
}

void CudaExecutor::add_graph(size_t index, const Layout& layout, void* graph, const std::array<Range, 4>& layer) {
  context_.enter();
  Addresses at = bays_[index].addresses(layout, {});
  Ranges captured = {{{at[0], layout.routing_bytes()},
                      {at[1], layout.routing_bytes()},
                      {at[2], layout.tokens * layout.hidden_row()},
                      {at[3], layout.tokens * layout.scales_row()},
                      {at[4], layout.tokens * layout.sums_row()}}};
  std::copy(layer.begin(), layer.end(), captured.begin() + static_cast<size_t>(Name::kUpGate));
  Graph made(driver_, graph, captured);
  made.upload(streams_.compute.get());
  ledger_.add({index, layout.tokens, layout.hidden_dtype, layout.reply_dtype}, std::move(made));
}

void CudaExecutor::start(Batch* batch, uint64_t now_ns) {
  batch->device_lost = !lost_.empty();
  if (batch->device_lost) return refuse(batch, lost_);
  std::string error;
  const uint32_t tokens = class_of(*batch, &error);
  if (!tokens) return refuse(batch, std::move(error));
  const size_t index = std::find(busy_.begin(), busy_.end(), false) - busy_.begin();
  if (index == busy_.size()) return refuse(batch, "every bay is in use");
  Entry* entry = ledger_.find({index, tokens, batch->hidden_dtype, batch->reply_dtype});
  if (!entry) return refuse(batch, "no graph was captured for " + std::to_string(tokens) + " tokens of these dtypes");
  busy_[index] = true;
  Run& run = runs_.emplace_back(batch, index, entry);
  copy(run, bays_[index].stage(*batch, layout(tokens, batch->hidden_dtype, batch->reply_dtype)), now_ns);
  advance(run, now_ns);
}

uint32_t CudaExecutor::class_of(const Batch& batch, std::string* error) const {
  if (batch.top_k > options_.shape.max_top_k) {
    *error = std::to_string(batch.top_k) + " experts a token exceed " + std::to_string(options_.shape.max_top_k);
    return 0;
  }
  auto found = std::lower_bound(options_.classes.begin(), options_.classes.end(), batch.tokens);
  if (found != options_.classes.end() && batch.tokens > 0) return *found;
  *error = std::to_string(batch.tokens) + " tokens: a batch has 1 to " + std::to_string(options_.classes.back());
  return 0;
}

void CudaExecutor::refuse(Batch* batch, std::string error) {
  batch->error = std::move(error);
  finished_.push_back(batch);
}

Batch* CudaExecutor::poll(uint64_t now_ns) {
  runs_.remove_if([&](Run& run) { return advance(run, now_ns); });
  if (finished_.empty()) return nullptr;
  Batch* batch = finished_.front();
  finished_.pop_front();
  return batch;
}

uint64_t CudaExecutor::due_ns() const {
  uint64_t due = 0;
  for (const Run& run : runs_) {
    uint64_t its = run.phase == Phase::kLaunched ? run.launched_ns + run.entry->expected_ns
                   : run.phase == Phase::kFailed ? run.query_ns
                                                 : run.copying_ns;
    if (!due || its < due) due = its;
  }
  return due;
}

bool CudaExecutor::resume() {
  if (!runs_.empty() || driver_.cuCtxSetCurrent(context_.get()) != kCudaSuccess || !streams_.idle(driver_))
    return false;
  lost_.clear();
  return true;
}

bool CudaExecutor::advance(Run& run, uint64_t now_ns) {
  if (!run.copied.load(std::memory_order_acquire)) return false;
  if (run.phase == Phase::kStaging) {
    if (!lost_.empty()) return fail(run, lost_, true);
    launch(run, now_ns);
  }
  if (run.phase == Phase::kFailed) return advance_failed(run, now_ns);
  if (run.phase == Phase::kLaunched && advance_launched(run, now_ns)) return true;
  if (run.phase == Phase::kLaunched || !run.copied.load(std::memory_order_acquire)) return false;
  run.batch->timings.copy_out += seconds(run.copying_ns, now_ns);
  return finish(run);
}

void CudaExecutor::copy(Run& run, const std::vector<Copy>& copies, uint64_t now_ns) {
  run.copying_ns = now_ns;
  size_t bytes = 0;
  for (const Copy& copy : copies) bytes += copy.bytes;
  run.copied = bytes <= kInPlaceBytes;
  if (!run.copied) return copier_->start(copies, &run.copied);
  for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
}

void CudaExecutor::launch(Run& run, uint64_t now_ns) {
  Entry& entry = *run.entry;
  run.staging = seconds(run.copying_ns, now_ns);
  const bool timed = !entry.expected_ns || ++entry.untimed >= options_.time_every;
  run.launched_ns = now_ns;
  run.query_ns = now_ns + 2 * (entry.expected_ns ? entry.expected_ns : kFirstExpectedNs);
  run.phase = Phase::kLaunched;
  try {
    context_.enter();
    bay_of(run).launch(*run.batch, entry.graph, timed);
  } catch (const DeviceError& error) {
    run.batch->error = error.what();
    run.query_ns = now_ns;
    run.phase = Phase::kFailed;
    bay_of(run).mark_failed();
  }
}

bool CudaExecutor::advance_launched(Run& run, uint64_t now_ns) {
  Bay& bay = bay_of(run);
  if (!bay.ended()) {
    if (!lost_.empty()) return fail(run, lost_, true);
    if (now_ns < run.query_ns) return false;
    run.query_ns = now_ns + kQueryNs;
    int code = bay.query();
    if (code == kCudaNotReady) return false;
    if (code != kCudaSuccess) lost_ = driver_.describe(code);
    if (!bay.ended())  // it may have ended since the last look
      return fail(run, lost_.empty() ? "the device failed: a batch ended without its end word" : lost_, !lost_.empty());
  }
  fetch(run, now_ns);
  return false;
}

// A failed call fails its batch alone, unless the device answers with an error from then on.
bool CudaExecutor::advance_failed(Run& run, uint64_t now_ns) {
  if (!lost_.empty()) return fail(run, lost_, true);
  if (now_ns < run.query_ns) return false;
  run.query_ns = now_ns + kQueryNs;
  int code = bay_of(run).query_failed();
  if (code == kCudaNotReady) return false;
  if (code != kCudaSuccess) lost_ = driver_.describe(code);
  return fail(run, lost_.empty() ? run.batch->error : lost_, !lost_.empty());
}

void CudaExecutor::fetch(Run& run, uint64_t now_ns) {
  Entry& entry = *run.entry;
  Timings timings;
  bay_of(run).read_timings(&timings);
  if (timings.measured) {
    entry.timings = timings;
    entry.untimed = 0;
  }
  run.batch->timings = entry.timings;
  run.batch->timings.measured = timings.measured;
  run.batch->timings.copy_in += run.staging;
  entry.expected_ns = std::max<uint64_t>(now_ns - run.launched_ns, 1);
  run.phase = Phase::kFetching;
  copy(run, bay_of(run).fetch(run.batch), now_ns);
}

bool CudaExecutor::finish(const Run& run) {
  busy_[run.bay] = false;
  finished_.push_back(run.batch);
  return true;
}

bool CudaExecutor::fail(const Run& run, std::string error, bool device_lost) {
  run.batch->error = std::move(error);
  run.batch->device_lost = device_lost;
  return finish(run);
}

}  // namespace expertd::cuda
