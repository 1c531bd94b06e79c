#include "cuda/executor.h"

#include <algorithm>
#include <array>
#include <utility>

namespace expertd::cuda {

namespace {

constexpr uint64_t kQueryNs = 10'000'000;         // between two questions about a batch that is late
constexpr uint64_t kFirstExpectedNs = 5'000'000;  // of a batch whose kind was never launched
constexpr uint32_t kPartStep = 64;                // the tokens of a part are a multiple of it

double seconds(uint64_t begin_ns, uint64_t end_ns) { return static_cast<double>(end_ns - begin_ns) * 1e-9; }

uint32_t pieces(uint32_t whole, uint32_t piece) { return (whole + piece - 1) / piece; }

Dtype hidden_dtype(const Batch& batch) { return batch.first().hidden_dtype; }
Dtype sums_dtype(const Batch& batch) { return batch.first().sums_dtype(); }

bool on_host(const Batch& batch) {
  return std::any_of(batch.jobs.begin(), batch.jobs.end(), [](const auto& job) { return !is_on_device(job->reach); });
}

}  // namespace

CudaExecutor::CudaExecutor(const Driver& driver, Options options, std::shared_ptr<Copier> copier)
    : driver_(driver),
      options_(std::move(options)),
      copier_(std::move(copier)),
      context_(driver, options_.device),
      streams_(driver, options_.express_rows, context_.reaches_registered()),
      busy_(options_.depth + has_express(), false),
      most_rows_(busy_.size(), 0) {
  for (size_t i = 0; i < busy_.size(); i++) {
    size_t inward = 0, outward = 0;
    for (uint32_t tokens = 1; tokens <= most_tokens(i); tokens++) {
      for (bool host : {false, true}) {
        const Cut its = cut(tokens, host);
        const Layout largest = layout(its.rows, Dtype::kBFloat16, Dtype::kFloat32);
        inward = std::max(inward, its.parts * largest.inward_bytes());
        outward = std::max(outward, its.parts * largest.outward_bytes());
        most_rows_[i] = std::max(most_rows_[i], its.rows);
      }
    }
    // What is added of several devices' sums goes out from there.
    inward = std::max(inward, pieces(most_tokens(i), 2) * layout(0, Dtype::kBFloat16, Dtype::kFloat32).sums_row());
    bays_.emplace_back(driver, streams_, inward, outward);
  }
  copier_->on_done([this] { wake(); });
}

uint32_t CudaExecutor::most_tokens(size_t bay) const {
  return bay < options_.depth ? options_.max_tokens : std::min(options_.max_tokens, kSmallTokens - 1);
}

size_t CudaExecutor::free_bay(bool express) const {
  const auto first = busy_.begin() + static_cast<ptrdiff_t>(express ? options_.depth : 0);
  const auto last = express ? busy_.end() : busy_.begin() + static_cast<ptrdiff_t>(options_.depth);
  const auto found = std::find(first, last, false);
  return found == last ? busy_.size() : static_cast<size_t>(found - busy_.begin());
}

CudaExecutor::~CudaExecutor() {
  copier_->on_done(nullptr);
  driver_.cuCtxSetCurrent(context_.get());
  for (size_t i = 0; i < bays_.size(); i++)
    if (busy_[i] && (bays_[i].copying() || !streams_.idle(driver_))) bays_[i].abandon();
  if (!runs_.empty()) new std::list<Run>(std::move(runs_));  // with the requests' memory
}

// Few parts, as long as each other, so that none is computed in the configuration of a much smaller class.
Cut CudaExecutor::cut(uint32_t tokens, bool on_host) const {
  const uint32_t most = options_.classes.back(), limit = on_host ? std::min(most, options_.overlap_tokens) : most;
  uint32_t size = tokens;
  if (tokens > limit) size = std::min(limit, pieces(pieces(tokens, pieces(tokens, limit)), kPartStep) * kPartStep);
  return {pieces(tokens, size), size, *std::lower_bound(options_.classes.begin(), options_.classes.end(), size)};
}

Layout CudaExecutor::layout(uint32_t tokens, Dtype hidden_dtype, Dtype reply_dtype) const {
  return {options_.shape, tokens, hidden_dtype, reply_dtype};
}

void CudaExecutor::add_graphs(const Layout& layout, const std::vector<void*>& graphs,
                              const std::array<Range, 4>& layer) {
  if (graphs.empty() || options_.shape.hidden_size % graphs.size())
    throw DeviceError(std::to_string(graphs.size()) + " steps for " + std::to_string(options_.shape.hidden_size) +
                      " columns");
  context_.enter();
  const Addresses at = addresses(0, layout);
  Ranges captured = {{{at[0], layout.routing_bytes()},
                      {at[1], layout.routing_bytes()},
                      {at[2], layout.tokens * layout.hidden_row()},
                      {at[3], layout.tokens * layout.scales_row()},
                      {at[4], layout.tokens * layout.sums_row()},
                      {at[5], layout.pairs_bytes()}}};
  std::copy(layer.begin(), layer.end(), captured.begin() + static_cast<size_t>(Name::kUpGate));
  std::vector<Steps> steps;
  for (size_t bay = 0; bay < bays_.size(); bay++) {
    if (layout.tokens > most_rows_[bay]) continue;  // it never has so many
    steps.push_back(make_steps(driver_, graphs, captured));
    for (const Graph& graph : steps.back()) graph.upload(streams_.for_rows(layout.tokens).get());
  }
  ledger_.add({layout.tokens, layout.hidden_dtype, layout.reply_dtype, graphs.size() > 1}, std::move(steps));
}

// Between devices sums take as long as half of the kernels: they go while others are computed.
Entry* CudaExecutor::entry_for(const Batch& batch, const Layout& layout, const Cut& cut) {
  Ledger::Key key{layout.tokens, layout.hidden_dtype, layout.reply_dtype, true};
  if (batch.jobs.front()->reach == Reach::kPeer && Bay::fits(batch, layout, cut))
    if (Entry* entry = ledger_.find(key)) return entry;
  key.in_steps = false;
  return ledger_.find(key);
}

void CudaExecutor::add_adder(size_t parts, Dtype dtype, void* graph, Range result, const std::vector<Range>& captured) {
  context_.enter();
  Ranges ranges{};
  ranges[static_cast<size_t>(Name::kAdded)] = result;
  std::copy(captured.begin(), captured.end(), ranges.begin() + static_cast<size_t>(Name::kPart));
  LoneKernel kernel(driver_, graph, ranges);
  adders_.erase({parts, dtype});
  adders_.emplace(std::pair{parts, dtype}, std::move(kernel));
}

LoneKernel* CudaExecutor::adder(size_t parts, Dtype dtype) {
  const auto found = adders_.find({parts, dtype});
  return found == adders_.end() ? nullptr : &found->second;
}

void CudaExecutor::start(std::unique_ptr<Batch> batch, uint64_t now_ns) {
  batch->device_failed = !lost_.empty();
  if (batch->device_failed) return refuse(std::move(batch), lost_);
  if (std::string text = obstacle(*batch); !text.empty()) return refuse(std::move(batch), std::move(text));
  const Cut its = cut(static_cast<uint32_t>(batch->tokens), on_host(*batch));
  const Layout at = layout(its.rows, hidden_dtype(*batch), sums_dtype(*batch));
  Entry* entry = entry_for(*batch, at, its);
  if (!entry)
    return refuse(std::move(batch),
                  "no graph was captured for " + std::to_string(its.rows) + " tokens of these dtypes");
  const size_t index = free_bay(batch->express);
  // Of a batch that was given up, one may be in use although another batch may start.
  if (index == busy_.size()) return waiting_.push_back(std::move(batch));
  busy_[index] = true;
  Run& run = runs_.emplace_back(std::move(batch), index, its.parts, entry, now_ns);
  const bool timed = !entry->expected_ns || ++entry->untimed >= options_.time_every;
  bays_[index].stage(*run.batch, at, its, run.batch->first().owned->weights, timed, options_.piece_bytes,
                     copier_.get());
  if (advance(run, now_ns)) runs_.pop_back();
}

std::string CudaExecutor::obstacle(const Batch& batch) const {
  const Admitted& first = batch.first();
  if (first.top_k > options_.shape.max_top_k)
    return std::to_string(first.top_k) + " experts a token exceed " + std::to_string(options_.shape.max_top_k);
  if (batch.tokens < 1 || batch.tokens > options_.max_tokens)
    return std::to_string(batch.tokens) + " tokens: a batch has 1 to " + std::to_string(options_.max_tokens);
  if (first.owned->weights.front() == 0) return "layer " + std::to_string(first.layer) + " is not on the device";
  return {};
}

void CudaExecutor::refuse(std::unique_ptr<Batch> batch, std::string text) {
  batch->failure = Refusal{Code::kInternal, std::move(text)};
  finished_.push_back(std::move(batch));
}

void CudaExecutor::release(size_t bay) {
  busy_[bay] = false;
  if (!waiting_.empty()) wake();
}

void CudaExecutor::start_waiting(uint64_t now_ns) {
  for (auto& batch : std::exchange(waiting_, {})) start(std::move(batch), now_ns);
}

std::unique_ptr<Batch> CudaExecutor::poll(uint64_t now_ns) {
  runs_.remove_if([&](Run& run) { return advance(run, now_ns); });
  start_waiting(now_ns);
  if (finished_.empty()) return nullptr;
  auto batch = std::move(finished_.front());
  finished_.pop_front();
  return batch;
}

uint64_t CudaExecutor::due_ns() const {
  uint64_t due = 0;
  for (const Run& run : runs_) {
    if (run.phase != Phase::kLaunched && run.phase != Phase::kFailed) continue;  // the copier wakes
    uint64_t its = run.query_ns;
    if (run.phase == Phase::kLaunched) {
      const uint64_t expected = run.entry->expected_ns * run.parts;
      its = run.launched_ns + (bays_[run.bay].piecewise() ? expected / 2 : expected);
    }
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
  if (run.phase == Phase::kStaging) lost_.empty() ? feed(run, now_ns) : fail(run, lost_, true);
  if (run.phase == Phase::kStaging || run.phase == Phase::kLaunched) bay_of(run).fetch();
  if (run.phase == Phase::kLaunched) look(run, now_ns);
  if (run.phase == Phase::kFailed) look_at_failed(run, now_ns);
  if (run.phase != Phase::kEnding || bay_of(run).copying()) return false;
  if (!run.batch->failure) run.batch->seconds.copy_out += seconds(run.ending_ns, now_ns);
  run.batch->bay = run.bay;
  busy_[run.bay] = run.batch->keeps_sums && !run.batch->failure;
  finished_.push_back(std::move(run.batch));
  return true;
}

void CudaExecutor::feed(Run& run, uint64_t now_ns) {
  Bay& bay = bay_of(run);
  if (!bay.ready()) return;
  const uint64_t expected = run.entry->expected_ns * run.parts;
  run.query_ns = now_ns;
  try {
    context_.enter();
    if (!bay.begun()) run.staging = seconds(run.started_ns, now_ns);
    if (!bay.feed(run.entry->steps[run.bay])) return;
    run.launched_ns = now_ns;
    run.query_ns = now_ns + 2 * (expected ? expected : kFirstExpectedNs);
    run.phase = Phase::kLaunched;
  } catch (const DeviceError& error) {
    run.batch->failure = Refusal{Code::kInternal, error.what()};
    run.phase = Phase::kFailed;
    bay.mark_failed();
  }
}

void CudaExecutor::look(Run& run, uint64_t now_ns) {
  Bay& bay = bay_of(run);
  if (!bay.ended()) {
    if (!lost_.empty()) return fail(run, lost_, true);
    if (now_ns < run.query_ns) return;
    run.query_ns = now_ns + kQueryNs;
    driver_.cuCtxSetCurrent(context_.get());
    int code = bay.query();
    if (code == kCudaNotReady) return;
    if (code != kCudaSuccess) lost_ = driver_.describe(code);
    if (!bay.ended())  // it may have ended since the last look
      return fail(run, lost_.empty() ? "the device failed: a batch ended without its end word" : lost_, !lost_.empty());
  }
  fetch(run, now_ns);
}

// A failed call fails its batch alone, unless the device answers with an error from then on.
void CudaExecutor::look_at_failed(Run& run, uint64_t now_ns) {
  if (!lost_.empty()) return fail(run, lost_, true);
  if (now_ns < run.query_ns) return;
  run.query_ns = now_ns + kQueryNs;
  driver_.cuCtxSetCurrent(context_.get());
  int code = bay_of(run).query_failed();
  if (code == kCudaNotReady) return;
  if (code != kCudaSuccess) lost_ = driver_.describe(code);
  fail(run, lost_.empty() ? run.batch->failure->text : lost_, !lost_.empty());
}

void CudaExecutor::fetch(Run& run, uint64_t now_ns) {
  Entry& entry = *run.entry;
  Bay& bay = bay_of(run);
  DeviceSeconds measured;
  driver_.cuCtxSetCurrent(context_.get());  // another device's, where there are several
  const bool timed = bay.read_seconds(&measured);
  if (timed) {
    entry.seconds = measured;
    entry.untimed = 0;
  }
  run.batch->seconds = entry.seconds;
  run.batch->seconds.measured = timed;
  run.batch->seconds.copy_in += run.staging;
  run.batch->pairs = bay.pairs();
  // What the device says: how long it takes until somebody looks is no time of the batch's.
  const double marked = entry.seconds.copy_in + entry.seconds.compute + entry.seconds.copy_out;
  uint64_t took = now_ns - run.launched_ns;
  if (marked > 0) took = std::min(took, static_cast<uint64_t>(marked * 1e9));
  entry.expected_ns = std::max<uint64_t>(took / run.parts, 1);
  run.ending_ns = now_ns;
  run.phase = Phase::kEnding;
  bay.fetch();
}

void CudaExecutor::fail(Run& run, std::string text, bool device_failed) {
  run.batch->failure = Refusal{Code::kInternal, std::move(text)};
  run.batch->device_failed = device_failed;
  run.phase = Phase::kEnding;
}

}  // namespace expertd::cuda
