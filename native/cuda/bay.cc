#include "cuda/bay.h"

#include <algorithm>

namespace expertd::cuda {

namespace {

constexpr size_t kInPlaceBytes = 256 << 10;  // copies between host memory up to this are made at once
constexpr size_t kPieces = 4;                // that a batch is staged in at least, if they are not too small

uint64_t place_of(const void* memory) { return reinterpret_cast<uint64_t>(memory); }

Reach reach_of(Reach reach, size_t bytes) {
  return reach == Reach::kPinned && bytes <= kDirectBytes ? Reach::kPageable : reach;
}

}  // namespace

bool Streams::idle(const Driver& driver) const {
  for (const Stream* stream : {&inward, &compute, &outward, &express})
    if (driver.cuStreamQuery(stream->get()) != kCudaSuccess) return false;
  return true;
}

Bay::Bay(const Driver& driver, const Streams& streams, size_t inward, size_t outward)
    : driver_(driver),
      streams_(streams),
      pinned_in_(make_pinned_memory(driver, inward)),
      pinned_out_(make_pinned_memory(driver, outward)),
      pinned_words_(make_pinned_memory(driver, 64)),  // a line of their own
      device_in_(make_device_memory(driver, inward)),
      device_out_(make_device_memory(driver, outward)),
      arrived_(make_event(driver)),
      computed_(make_event(driver)),
      in_{.inward = true, .memory = host_in(), .there = device_in_.get()},
      out_{.inward = false, .memory = host_out(), .there = device_out_.get()} {
  for (Event& event : marks_) event = make_event(driver);
  words()[0] = 0;
}

bool Bay::fits(const Batch& batch, const Layout& layout, const Cut& cut) {
  const Job& job = *batch.jobs.front();
  if (batch.jobs.size() != 1 || !is_on_device(job.reach) || batch.keeps_sums) return false;
  if (batch.tokens != uint64_t{cut.parts} * layout.tokens) return false;
  const void* const places[] = {job.request.hidden.data(), job.request.scales.data(), job.sums};
  return std::all_of(std::begin(places), std::end(places), [](auto at) { return place_of(at) % kAlignment == 0; });
}

Addresses Bay::addresses_in(DevicePointer in, DevicePointer out, const Layout& layout,
                            const std::array<DevicePointer, 4>& layer) {
  return {in + layout.ids(),
          in + layout.weights(),
          in + layout.hidden(),
          layout.scales_row() ? in + layout.scales() : 0,
          out + layout.sums(),
          out + layout.pairs(),
          layer[0],
          layer[1],
          layer[2],
          layer[3]};
}

void Bay::stage(const Batch& batch, const Layout& layout, const Cut& cut, const std::array<DevicePointer, 4>& layer,
                bool timed, size_t piece_bytes, Copier* copier) {
  const bool express = cut.parts == 1 && batch.tokens < kSmallTokens && layout.tokens <= streams_.express_rows;
  layout_ = layout, layer_ = layer, copier_ = copier;
  own_ = own_rows(batch, cut, express);
  outward_ = device_out_.get();
  ticket_++;  // now: what an earlier launch left may not be taken for the end of this one
  words()[1] = 0;
  part_ = sent_ = fetched_ = 0;
  begun_ = false;
  parts_.clear(), fetches_.clear(), in_.reset(), out_.reset();
  for (const auto& job : batch.jobs) {
    const size_t tokens = job->tokens();
    const size_t hidden = tokens * layout.hidden_row(), sums = tokens * layout.sums_row();
    const bool stages_hidden = reach_of(job->reach, hidden) == Reach::kPageable;
    const bool stages_sums = !batch.keeps_sums && reach_of(job->sums_reach(), sums) == Reach::kPageable;
    in_.staged += 8 * tokens * layout.shape.max_top_k;
    if (!is_on_device(job->reach)) in_.staged += tokens * layout.scales_row();
    if (stages_hidden) in_.staged += hidden;
    if (stages_sums) out_.staged += sums;
    in_.direct |= !stages_hidden && !own_.hidden;
    out_.direct |= !stages_sums && !own_.sums;
  }
  const size_t padding = express ? layout.tokens - batch.tokens : 0;
  in_.mapped = express && !in_.direct && padding * layout.hidden_row() <= kPaddingBytes;
  out_.mapped = express && !out_.direct && padding * layout.sums_row() <= kPaddingBytes;
  for (Way* way : {&in_, &out_}) limit(*way, piece_bytes);
  for (uint32_t first = 0; first < batch.tokens; first += cut.tokens) {
    parts_.push_back({first, std::min(cut.tokens, static_cast<uint32_t>(batch.tokens) - first)});
    plan(batch, parts_.size() - 1);
  }
  timed_ = timed || !small();
  for (Piece& piece : out_.pieces)
    if (!piece.copies.empty()) fetches_.push_back(&piece);
  for (Piece& piece : in_.pieces) copy(piece, in_);
}

// Kernels read and write rows of padding, too, but for those of a lone request that fills its class.
Bay::Own Bay::own_rows(const Batch& batch, const Cut& cut, bool express) const {
  const Job& job = *batch.jobs.front();
  const auto& [hidden, scales] = std::pair(job.request.hidden.data(), job.request.scales.data());
  if (fits(batch, layout_, cut)) return {place_of(hidden), place_of(scales), place_of(job.sums)};
  if (batch.jobs.size() != 1 || batch.tokens != uint64_t{cut.parts} * layout_.tokens) return {};
  const auto place = [](const void* memory) { return place_of(memory) % kSegmentAlignment ? 0 : place_of(memory); };
  const auto reached = [&](Reach reach, size_t bytes) {
    return express && streams_.reaches_registered && reach_of(reach, bytes) == Reach::kPinned;
  };
  Own own;
  if (reached(job.reach, batch.tokens * layout_.hidden_row())) own.hidden = place(hidden);
  if (!batch.keeps_sums && reached(job.sums_reach(), batch.tokens * layout_.sums_row())) own.sums = place(job.sums);
  return own;
}

void Bay::plan(const Batch& batch, size_t index) {
  Part& part = parts_[index];
  const size_t in = index * layout_.inward_bytes(), out = index * layout_.outward_bytes();
  in_.pieces.emplace_back(in, 0, layout_.scales(), Reach::kPageable);
  plan_routing(batch, part, host_in() + in, &in_.pieces.back().copies);
  out_.pieces.emplace_back(out + layout_.pairs(), 0, layout_.pairs_bytes(), Reach::kPageable);
  if (layout_.scales_row() && !own_.scales) {
    plan_rows(batch, part.first, part.first + part.tokens, layout_.scales_row(),
              [&](const Job& job, size_t skip, size_t at, size_t bytes) {
                const Reach reach = is_on_device(job.reach) ? job.reach : Reach::kPageable;
                in_.add(in + layout_.scales() + at, place_of(job.request.scales.data()) + skip, bytes, reach);
              });
  }
  if (!own_.hidden) {
    plan_rows(batch, part.first, part.first + part.tokens, layout_.hidden_row(),
              [&](const Job& job, size_t skip, size_t at, size_t bytes) {
                const Reach reach = reach_of(job.reach, job.request.hidden.size());
                in_.add(in + layout_.hidden() + at, place_of(job.request.hidden.data()) + skip, bytes, reach);
              });
  }
  if (!own_.sums && !batch.keeps_sums) {
    plan_rows(batch, part.first, part.first + part.tokens, layout_.sums_row(),
              [&](const Job& job, size_t skip, size_t at, size_t bytes) {
                const Reach reach = reach_of(job.sums_reach(), job.tokens() * layout_.sums_row());
                out_.add(out + layout_.sums() + at, place_of(job.sums) + skip, bytes, reach);
              });
  }
  part.inward_end = in_.pieces.size();
  part.outward_end = out_.pieces.size();
}

// Calls `add(job, bytes to skip in its memory, bytes to skip in that of the rows, bytes)` for each request that has any
// of the rows `from` to `until`.
template <typename Add>
void Bay::plan_rows(const Batch& batch, uint32_t from, uint32_t until, size_t row, const Add& add) {
  uint32_t first = 0;
  for (const auto& job : batch.jobs) {
    const uint32_t begin = std::max(first, from), end = std::min(first + job->tokens(), until);
    if (begin < end) add(*job, (begin - first) * row, (begin - from) * row, (end - begin) * row);
    first += job->tokens();
  }
}

// `to`: of the part, in pinned memory.
void Bay::plan_routing(const Batch& batch, const Part& part, uint8_t* to, std::vector<Copy>* copies) const {
  const size_t top_k = batch.first().top_k, wide = 4 * size_t{layout_.shape.max_top_k}, narrow = 4 * top_k;
  plan_rows(batch, part.first, part.first + part.tokens, narrow,
            [&](const Job& job, size_t skip, size_t at, size_t bytes) {
              const size_t row = narrow == wide ? 0 : narrow, padded_at = at / narrow * wide,
                           padded_bytes = bytes / narrow * wide;
              auto ids = reinterpret_cast<const char*>(job.request.local_ids.data());
              copies->push_back({to + layout_.ids() + padded_at, ids + skip, padded_bytes, 0xFF, row, wide});  // -1
              copies->push_back(
                  {to + layout_.weights() + padded_at, job.request.weights.data() + skip, padded_bytes, 0, row, wide});
            });
  const size_t used = part.tokens * wide;
  if (used < layout_.routing_bytes())
    copies->push_back({to + layout_.ids() + used, nullptr, layout_.routing_bytes() - used, 0xFF});
}

// Adds bytes at `offset` of the bay's memory to the pieces. Staged ones that follow each other become one copy of the
// device, with what is padding between them.
void Bay::Way::add(size_t offset, uint64_t place, size_t bytes, Reach reach) {
  for (const size_t end = offset + bytes; offset < end;) {
    size_t taken = end - offset;
    if (reach == Reach::kPageable) {
      if (pieces.empty() || pieces.back().reach != Reach::kPageable || offset - pieces.back().offset >= limit)
        pieces.emplace_back(offset, 0, 0, Reach::kPageable);
      Piece& piece = pieces.back();
      taken = std::min(taken, limit - (offset - piece.offset));
      piece.bytes = offset + taken - piece.offset;
      void* const staged = memory + offset;
      void* const own = reinterpret_cast<void*>(place);
      piece.copies.push_back(inward ? Copy{staged, own, taken} : Copy{own, staged, taken});
    } else {
      if (reach == Reach::kPinned) taken = std::min(taken, kPinStep - place % kPinStep);
      pieces.emplace_back(offset, place, taken, reach);
    }
    offset += taken;
    place += taken;
  }
}

void Bay::copy(Piece& piece, const Way& way) {
  if (!piece.copies.empty() && way.staged > kInPlaceBytes) {
    copies_.push_back(&piece);
    return copier_->start(piece.copies, &piece.copied);
  }
  for (const Copy& copy : piece.copies) copy.make();
  piece.copied = true;
}

bool Bay::ready() const {
  for (size_t i = part_ ? parts_[part_ - 1].inward_end : 0; i < parts_[part_].inward_end; i++) {
    const Piece& piece = in_.pieces[i];
    if (!piece.moved && piece.copied.load(std::memory_order_acquire)) return true;
  }
  return false;
}

bool Bay::feed(Steps& steps) {
  if (timed_ && !begun_) mark(marks_[0], in_stream());
  begun_ = true;
  for (; part_ < parts_.size(); part_++) {
    bool all = true;
    for (size_t i = part_ ? parts_[part_ - 1].inward_end : 0; i < parts_[part_].inward_end; i++) {
      Piece& piece = in_.pieces[i];
      if (piece.moved) continue;
      if (piece.copied.load(std::memory_order_acquire)) {
        move_in(piece);
      } else {
        all = false;
      }
    }
    if (!all) return false;
    compute(part_, steps);
  }
  write(0, ticket_);
  return true;
}

// Enqueues what follows a part's copies inward.
void Bay::compute(size_t part, Steps& steps) {
  const bool first = part == 0, last = part + 1 == parts_.size();
  const Event& arrived = first ? marks_[1] : arrived_;
  const Event& computed = last ? marks_[3] : computed_;
  if (timed_) mark(arrived, in_stream());
  if (!small()) wait(compute_stream(), arrived);
  if (!small() && first) mark(marks_[2], compute_stream());
  const Addresses at = addresses_of(part);
  Addresses staged = at;
  staged[static_cast<size_t>(Name::kSums)] = out_.there + part * layout_.outward_bytes() + layout_.sums();
  for (size_t step = 0; step + 1 < steps.size(); step++) {
    launch(steps[step], staged);
    mark(computed_, compute_stream());
    wait(out_stream(), computed_);
    move_columns(part, step, steps.size());
  }
  launch(steps.back(), at);
  if (timed_) mark(computed, compute_stream());
  if (!small()) wait(out_stream(), computed);
  if (!small() && last) mark(marks_[4], out_stream());
  for (size_t i = part ? parts_[part - 1].outward_end : 0; i < parts_[part].outward_end; i++) move_out(out_.pieces[i]);
  if (timed_ && last) mark(marks_[5], out_stream());
}

void Bay::launch(Graph& graph, const Addresses& at) {
  graph.bind(at);
  graph.launch(compute_stream().get());
}

Addresses Bay::addresses_of(size_t part) const {
  Addresses at = addresses_in(in_.at() + part * layout_.inward_bytes(), out_.at() + part * layout_.outward_bytes(),
                              layout_, layer_);
  const size_t row = part * layout_.tokens;
  if (own_.hidden) at[static_cast<size_t>(Name::kHidden)] = own_.hidden + row * layout_.hidden_row();
  if (own_.scales) at[static_cast<size_t>(Name::kScales)] = own_.scales + row * layout_.scales_row();
  if (own_.sums) at[static_cast<size_t>(Name::kSums)] = own_.sums + row * layout_.sums_row();
  return at;
}

void Bay::add(const Batch& whole, uint32_t first, uint32_t end, const std::vector<const Bay*>& bays, LoneKernel& adder,
              size_t piece_bytes, Copier* copier) {
  const size_t row = layout_.shape.hidden_size * size_of(whole.first().sums_dtype());
  copier_ = copier;
  // What came in is not needed any more. There is room for half of the rows at their widest.
  outward_ = device_in_.get();
  ticket_++;
  words()[1] = 0;
  sent_ = fetched_ = 0;
  fetches_.clear(), out_.reset();
  plan_rows(whole, first, end, row, [&](const Job& job, size_t, size_t, size_t bytes) {
    if (reach_of(job.sums_reach(), bytes) == Reach::kPageable) out_.staged += bytes;
  });
  limit(out_, piece_bytes);
  plan_rows(whole, first, end, row, [&](const Job& job, size_t skip, size_t at, size_t bytes) {
    out_.add(at, place_of(job.sums) + skip, bytes, reach_of(job.sums_reach(), bytes));
  });
  for (Piece& piece : out_.pieces)
    if (!piece.copies.empty()) fetches_.push_back(&piece);
  mark(marks_[4], out_stream());
  for (size_t part = 0; part < parts_.size(); part++) {
    const uint32_t begin = std::max(first, parts_[part].first);
    const uint32_t until = std::min(end, parts_[part].first + parts_[part].tokens);
    if (begin >= until) continue;
    Addresses at{};
    at[static_cast<size_t>(Name::kAdded)] = outward_ + (begin - first) * row;
    for (size_t i = 0; i < bays.size(); i++)
      at[static_cast<size_t>(Name::kPart) + i] = bays[i]->device_out_.get() + part * layout_.outward_bytes() +
                                                 layout_.sums() + (begin - parts_[part].first) * layout_.sums_row();
    adder.launch(at, until - begin, out_stream());
  }
  for (Piece& piece : out_.pieces) move_out(piece);
  mark(marks_[5], out_stream());
  write(0, ticket_);
}

bool Bay::read_added(double* seconds) const {
  float milliseconds = 0;
  const int code = driver_.cuEventElapsedTime(&milliseconds, marks_[4].get(), marks_[5].get());
  *seconds = milliseconds * 1e-3;
  return code == kCudaSuccess;
}

void Bay::limit(Way& way, size_t piece_bytes) {
  way.limit = way.staged <= kInPlaceBytes ? ~size_t{0} : std::clamp(way.staged / kPieces, piece_bytes, kPinStep);
}

void Bay::mark(const Event& event, const Stream& stream) {
  driver_.check(driver_.cuEventRecord(event.get(), stream.get()));
}

void Bay::wait(const Stream& stream, const Event& event) {
  driver_.check(driver_.cuStreamWaitEvent(stream.get(), event.get(), 0));
}

void Bay::write(size_t word, uint32_t value) {
  driver_.check(driver_.cuStreamWriteValue32(out_stream().get(), place_of(words() + word), value, 0));
}

void Bay::move_in(Piece& piece) {
  const DevicePointer to = device_in_.get() + piece.offset;
  void* const stream = in_stream().get();
  piece.moved = true;
  if (in_.mapped) return;
  if (is_on_device(piece.reach)) return driver_.check(driver_.cuMemcpyDtoDAsync(to, piece.place, piece.bytes, stream));
  const void* from = piece.reach == Reach::kPageable ? host_in() + piece.offset : reinterpret_cast<void*>(piece.place);
  driver_.check(driver_.cuMemcpyHtoDAsync(to, from, piece.bytes, stream));
}

void Bay::move_out(Piece& piece) {
  if (out_.mapped) return;
  const DevicePointer from = outward_ + piece.offset;
  void* const stream = out_stream().get();
  if (is_on_device(piece.reach))
    return driver_.check(driver_.cuMemcpyDtoDAsync(piece.place, from, piece.bytes, stream));
  void* to = piece.reach == Reach::kPageable ? host_out() + piece.offset : reinterpret_cast<void*>(piece.place);
  driver_.check(driver_.cuMemcpyDtoHAsync(to, from, piece.bytes, stream));
  if (!piece.copies.empty() && ++sent_ < fetches_.size()) write(1, static_cast<uint32_t>(sent_));
}

// Copies the columns of a part's sums that a step has left.
void Bay::move_columns(size_t part, size_t step, size_t steps) {
  const size_t row = layout_.sums_row(), width = row / steps;
  Copy2D copy{};
  copy.from_type = copy.to_type = kUnifiedMemory;
  copy.from = device_out_.get() + part * layout_.outward_bytes() + layout_.sums() + step * width;
  copy.to = own_.sums + part * layout_.tokens * row + step * width;
  copy.from_pitch = copy.to_pitch = row;
  copy.width = width, copy.height = parts_[part].tokens;
  driver_.check(driver_.cuMemcpy2DAsync(&copy, out_stream().get()));
}

void Bay::fetch() {
  const size_t arrived = ended() ? fetches_.size() : piecewise() ? read(1) : 0;
  while (fetched_ < arrived) copy(*fetches_[fetched_++], out_);
}

bool Bay::copying() {
  while (!copies_.empty() && copies_.back()->copied.load(std::memory_order_acquire)) copies_.pop_back();
  return !copies_.empty();
}

std::vector<uint32_t> Bay::pairs() const {
  std::vector<uint32_t> pairs(layout_.shape.num_experts);
  for (size_t part = 0; part < parts_.size(); part++) {
    auto its = reinterpret_cast<const uint32_t*>(host_out() + part * layout_.outward_bytes() + layout_.pairs());
    for (size_t expert = 0; expert < pairs.size(); expert++) pairs[expert] += its[expert];
  }
  return pairs;
}

bool Bay::read_seconds(DeviceSeconds* seconds) const {
  if (!timed_) return false;
  auto between = [&](size_t begin, size_t end, double* out) {
    float milliseconds = 0;
    int code = driver_.cuEventElapsedTime(&milliseconds, marks_[begin].get(), marks_[end].get());
    *out = milliseconds * 1e-3;
    return code == kCudaSuccess;
  };
  return between(0, 1, &seconds->copy_in) && between(small() ? 1 : 2, 3, &seconds->compute) &&
         between(small() ? 3 : 4, 5, &seconds->copy_out);
}

void Bay::mark_failed() {
  const std::array<void*, 3> streams = {in_stream().get(), compute_stream().get(), out_stream().get()};
  for (size_t i = 0; i < streams.size(); i++)
    marked_[i] = driver_.cuEventRecord(marks_[2 * i + 1].get(), streams[i]) == kCudaSuccess;
}

int Bay::query_failed() const {
  const std::array<void*, 3> streams = {in_stream().get(), compute_stream().get(), out_stream().get()};
  for (size_t i = 0; i < streams.size(); i++) {
    int code = marked_[i] ? driver_.cuEventQuery(marks_[2 * i + 1].get()) : driver_.cuStreamQuery(streams[i]);
    if (code != kCudaSuccess) return code;
  }
  return kCudaSuccess;
}

void Bay::abandon() {
  for (PinnedMemory* memory : {&pinned_in_, &pinned_out_, &pinned_words_}) memory->release();
  for (DeviceMemory* memory : {&device_in_, &device_out_}) memory->release();
  for (Way* way : {&in_, &out_}) new std::deque<Piece>(std::move(way->pieces));
}

}  // namespace expertd::cuda
