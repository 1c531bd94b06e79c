#include "cuda/bay.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace expertd::cuda {

namespace {

bool direct(const Part& part, size_t bytes) { return part.pinned && bytes > kDirectBytes; }

}  // namespace

bool Streams::idle(const Driver& driver) const {
  for (const Stream* stream : {&inward, &compute, &outward})
    if (driver.cuStreamQuery(stream->get()) != kCudaSuccess) return false;
  return true;
}

Bay::Bay(const Driver& driver, const Streams& streams, const Layout& largest)
    : driver_(driver),
      streams_(streams),
      pinned_in_(make_pinned_memory(driver, largest.inward_bytes())),
      pinned_out_(make_pinned_memory(driver, largest.outward_bytes())),
      pinned_word_(make_pinned_memory(driver, 64)),  // a line of its own
      device_in_(make_device_memory(driver, largest.inward_bytes())),
      device_out_(make_device_memory(driver, largest.outward_bytes())) {
  for (Event& event : marks_) event = make_event(driver);
  *word() = 0;
}

Addresses Bay::addresses(const Layout& layout, const std::array<DevicePointer, 4>& layer) const {
  DevicePointer in = inward(), scales = layout.scales_row() ? in + layout.scales() : 0;
  return {in + layout.ids(),
          in + layout.weights(),
          in + layout.hidden(),
          scales,
          outward() + layout.sums(),
          layer[0],
          layer[1],
          layer[2],
          layer[3]};
}

const std::vector<Copy>& Bay::stage(const Batch& batch, const Layout& layout) {
  layout_ = layout;
  tokens_ = batch.tokens;
  copies_.clear();
  stage_routing(batch);
  size_t scales_at = layout.scales(), hidden_at = layout.hidden();
  for (const Part& part : batch.parts) {
    size_t scales = part.tokens * layout.scales_row(), hidden = part.tokens * layout.hidden_row();
    if (scales) copies_.push_back({host_in() + scales_at, part.scales, scales});
    if (!direct(part, hidden)) copies_.push_back({host_in() + hidden_at, part.hidden, hidden});
    scales_at += scales;
    hidden_at += hidden;
  }
  return copies_;
}

void Bay::stage_routing(const Batch& batch) {
  const size_t width = layout_.shape.max_top_k, top_k = batch.top_k;
  auto ids = reinterpret_cast<int32_t*>(host_in() + layout_.ids());
  auto weights = reinterpret_cast<float*>(host_in() + layout_.weights());
  for (const Part& part : batch.parts) {
    size_t pairs = part.tokens * top_k;
    if (top_k == width) {
      copies_.push_back({ids, part.ids, 4 * pairs});
      copies_.push_back({weights, part.weights, 4 * pairs});
    } else {
      for (size_t token = 0; token < part.tokens; token++) {
        std::fill(std::copy_n(part.ids + token * top_k, top_k, ids + token * width), ids + (token + 1) * width, -1);
        std::fill(std::copy_n(part.weights + token * top_k, top_k, weights + token * width),
                  weights + (token + 1) * width, 0.0f);
      }
    }
    ids += part.tokens * width;
    weights += part.tokens * width;
  }
  std::fill_n(ids, (layout_.tokens - tokens_) * width, -1);
}

void Bay::launch(const Batch& batch, Graph& graph, bool timed) {
  timed_ = timed || !small();
  ticket_++;  // first: what an earlier launch left may not be taken for the end of this one
  const Stream& in = small() ? streams_.compute : streams_.inward;
  const Stream& out = small() ? streams_.compute : streams_.outward;
  graph.bind(addresses(layout_, batch.weights));
  if (timed_) mark(0, in);
  copy_in(batch, in.get());
  if (timed_) mark(1, in);
  if (!small()) {
    driver_.check(driver_.cuStreamWaitEvent(streams_.compute.get(), marks_[1].get(), 0));
    mark(2, streams_.compute);
  }
  graph.launch(streams_.compute.get());
  if (timed_) mark(3, streams_.compute);
  if (!small()) {
    driver_.check(driver_.cuStreamWaitEvent(out.get(), marks_[3].get(), 0));
    mark(4, out);
  }
  copy_out(batch, out.get());
  if (timed_) mark(5, out);
  driver_.check(driver_.cuStreamWriteValue32(out.get(), reinterpret_cast<DevicePointer>(word()), ticket_, 0));
}

void Bay::mark(size_t index, const Stream& stream) {
  driver_.check(driver_.cuEventRecord(marks_[index].get(), stream.get()));
}

template <typename Memory>
void Bay::plan(const Batch& batch, uint8_t* staging, size_t prefix, size_t row, Memory memory) {
  stretches_.assign(1, {0, staging, prefix, true});
  size_t offset = prefix;
  for (const Part& part : batch.parts) {
    const size_t end = offset + part.tokens * row;
    if (!direct(part, end - offset)) {
      if (stretches_.back().staged) {
        stretches_.back().bytes += end - offset;
      } else {
        stretches_.push_back({offset, staging + offset, end - offset, true});
      }
      offset = end;
    }
    for (uint8_t* host = memory(part); offset < end;) {
      size_t bytes = std::min(end - offset, kPinStep - reinterpret_cast<uintptr_t>(host) % kPinStep);
      stretches_.push_back({offset, host, bytes, false});
      offset += bytes;
      host += bytes;
    }
  }
}

void Bay::copy_in(const Batch& batch, void* stream) {
  plan(batch, host_in(), layout_.hidden(), layout_.hidden_row(),
       [](const Part& part) { return const_cast<uint8_t*>(part.hidden); });  // read only
  for (const Stretch& stretch : stretches_)
    driver_.check(driver_.cuMemcpyHtoDAsync(inward() + stretch.offset, stretch.host, stretch.bytes, stream));
}

void Bay::copy_out(const Batch& batch, void* stream) {
  plan(batch, host_out(), layout_.sums(), layout_.sums_row(), [](const Part& part) { return part.sums; });
  for (const Stretch& stretch : stretches_)
    driver_.check(driver_.cuMemcpyDtoHAsync(stretch.host, outward() + stretch.offset, stretch.bytes, stream));
}

bool Bay::ended() const { return std::atomic_ref(*word()).load(std::memory_order_acquire) == ticket_; }

const std::vector<Copy>& Bay::fetch(Batch* batch) {
  auto pairs = reinterpret_cast<const uint32_t*>(host_out() + layout_.pairs());
  batch->pairs.assign(pairs, pairs + layout_.shape.num_experts);
  copies_.clear();
  size_t offset = layout_.sums();
  for (const Part& part : batch->parts) {
    size_t bytes = part.tokens * layout_.sums_row();
    if (!direct(part, bytes)) copies_.push_back({part.sums, host_out() + offset, bytes});
    offset += bytes;
  }
  return copies_;
}

void Bay::read_timings(Timings* timings) const {
  if (!timed_) return;
  auto seconds = [&](size_t begin, size_t end, double* out) {
    float milliseconds = 0;
    int code = driver_.cuEventElapsedTime(&milliseconds, marks_[begin].get(), marks_[end].get());
    *out = milliseconds * 1e-3;
    return code == kCudaSuccess;
  };
  timings->measured = seconds(0, 1, &timings->copy_in) && seconds(small() ? 1 : 2, 3, &timings->compute) &&
                      seconds(small() ? 3 : 4, 5, &timings->copy_out);
}

void Bay::mark_failed() {
  const std::array<void*, 3> streams = {streams_.inward.get(), streams_.compute.get(), streams_.outward.get()};
  for (size_t i = 0; i < streams.size(); i++)
    marked_[i] = driver_.cuEventRecord(marks_[2 * i + 1].get(), streams[i]) == kCudaSuccess;
}

int Bay::query_failed() const {
  const std::array<void*, 3> streams = {streams_.inward.get(), streams_.compute.get(), streams_.outward.get()};
  for (size_t i = 0; i < streams.size(); i++) {
    int code = marked_[i] ? driver_.cuEventQuery(marks_[2 * i + 1].get()) : driver_.cuStreamQuery(streams[i]);
    if (code != kCudaSuccess) return code;
  }
  return kCudaSuccess;
}

void Bay::abandon() {
  for (PinnedMemory* memory : {&pinned_in_, &pinned_out_, &pinned_word_}) memory->release();
  for (DeviceMemory* memory : {&device_in_, &device_out_}) memory->release();
}

}  // namespace expertd::cuda
