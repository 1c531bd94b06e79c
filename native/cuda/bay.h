// What one device batch occupies: pinned and device memory, streams, events, and the word that tells its end.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <vector>

#include "cuda/copier.h"
#include "cuda/driver.h"
#include "cuda/layout.h"
#include "cuda/ledger.h"
#include "engine/batch.h"

namespace expertd::cuda {

// Rows of a request in pinned memory that are more bytes than this are copied by the device from where they are.
inline constexpr size_t kDirectBytes = 64 << 10;
// No copy of the device crosses a multiple of this in a request's memory, which is pinned step by step at multiples of
// it; nor is more staged at once.
inline constexpr size_t kPinStep = 2 << 20;
// Where kernels work on the host's memory, rows of padding may cost them so many bytes of the bus.
inline constexpr size_t kPaddingBytes = 1 << 20;

// Batches compute one after another, in memory that they share, while others are copied in and out. Those of few rows
// need not wait for those of many: they compute beside them, in memory of their own, and have the processors that
// become free. Nor need they wait for the engines that copy, which take one copy after the other: their kernels work on
// the host's memory.
struct Streams {
  Streams(const Driver& driver, uint32_t express_rows, bool reaches_registered)
      : express_rows(express_rows),
        reaches_registered(reaches_registered),
        inward(make_stream(driver)),
        compute(make_stream(driver)),
        outward(make_stream(driver)),
        express(make_stream(driver, kHighestPriority)) {}
  // Where graphs of so many rows compute.
  const Stream& for_rows(uint32_t rows) const { return rows <= express_rows ? express : compute; }
  // Whether all that was asked for is done, without an error.
  bool idle(const Driver& driver) const;

  const uint32_t express_rows;
  const bool reaches_registered;  // whether kernels find requests' pinned memory at the host's addresses
  Stream inward, compute, outward, express;
};

// What one device batch occupies: pinned and device memory, events, and a word that tells its end. All of it is
// allocated before serving. Holds one batch at a time; nothing here waits for the device.
//
// A batch comes and goes in pieces. What the device cannot reach is staged: copied by the host, while the device copies
// other pieces and computes earlier parts.
class Bay {
 public:
  // Bytes that one copy of the device moves, between the bay's memory there and another place.
  struct Piece {
    Piece(size_t offset, uint64_t place, size_t bytes, Reach reach)
        : offset(offset), place(place), bytes(bytes), reach(reach) {}

    size_t offset;   // in the bay's memory, on the device as in pinned memory
    uint64_t place;  // where a request has it, on the host or the device; staged: not used
    size_t bytes;
    Reach reach;               // kPageable: staged
    std::vector<Copy> copies;  // to or from pinned memory
    std::atomic<bool> copied{false};
    bool moved = false;  // the device has been asked to
  };

  // Room for `inward` and `outward` bytes.
  Bay(const Driver& driver, const Streams& streams, size_t inward, size_t outward);

  // The addresses on the device of the first part of a batch, without a layer's.
  Addresses addresses(const Layout& layout) const { return addresses_in(in_.there, out_.there, layout, {}); }

  // Takes a batch and begins to stage it. With `timed`, its stages are recorded although it is small. Copies are of
  // `piece_bytes` or more.
  void stage(const Batch& batch, const Layout& layout, const Cut& cut, const std::array<DevicePointer, 4>& layer,
             bool timed, size_t piece_bytes, Copier* copier);
  // Whether kernels can work on the memory of a batch's only request, which is a device's. Where it is padded they
  // would write past the end.
  static bool fits(const Batch& batch, const Layout& layout, const Cut& cut);
  // Whether there is anything to enqueue.
  bool ready() const;
  bool begun() const { return begun_; }
  // Enqueues what can be; whether that was everything, up to the end word. Several steps are for a batch that fits: the
  // sums of all but the last are copied to their place while the next step computes. Throws `DeviceError`.
  bool feed(Steps& steps);
  // Adds rows `first` to `end` of what is kept of a batch here and in other `bays`, this one among them, and moves them
  // to where the `whole` batch wants them: from then on it ends, and is fetched, like any. Throws `DeviceError`.
  void add(const Batch& whole, uint32_t first, uint32_t end, const std::vector<const Bay*>& bays, LoneKernel& adder,
           size_t piece_bytes, Copier* copier);
  // Seconds of adding and copying out, if they can be told.
  bool read_added(double* seconds) const;

  // Whether the device has written the end word.
  bool ended() const { return read(0) == ticket_; }
  // Begins to copy what the device has written to where it belongs.
  void fetch();
  // Whether copies between host memory are under way.
  bool copying();
  // Whether results come bit by bit, and not with the end alone.
  bool piecewise() const { return fetches_.size() > 1 && !out_.mapped; }
  // After the end: the counts of pairs, over all parts.
  std::vector<uint32_t> pairs() const;
  // The stages of a batch that ended, if they were recorded: whether they were.
  bool read_seconds(DeviceSeconds* seconds) const;

  // The state of the stream that the batch ends on: success once all of it is done.
  int query() const { return driver_.cuStreamQuery(out_stream().get()); }
  // After a launch that failed: marks how far the streams had got by then.
  void mark_failed();
  // After `mark_failed`: success once the device uses none of the batch's memory, not ready until then, or its error.
  int query_failed() const;
  // Lets go of all memory, which the device or the copier may yet use.
  void abandon();

 private:
  // Tokens that are computed at once, and where their pieces end.
  struct Part {
    uint32_t first, tokens;
    size_t inward_end = 0, outward_end = 0;
  };
  // The pieces of a batch in one direction.
  struct Way {
    const bool inward;
    uint8_t* const memory;      // pinned
    const DevicePointer there;  // as much on the device
    size_t staged = 0;          // bytes
    size_t limit = 0;           // of bytes that one copy of the device stages
    bool direct = false;        // whether the device copies from or to memory of requests
    bool mapped = false;        // whether kernels work on what is pinned: the device copies nothing
    std::deque<Piece> pieces = {};

    void reset() { pieces.clear(), staged = 0, direct = mapped = false; }
    // Where kernels work.
    DevicePointer at() const { return mapped ? reinterpret_cast<DevicePointer>(memory) : there; }
    void add(size_t offset, uint64_t place, size_t bytes, Reach reach);
  };

  // Addresses of the only request's rows, where kernels work on them; 0: they are in the bay's memory.
  struct Own {
    DevicePointer hidden = 0, scales = 0, sums = 0;
  };

  bool small() const { return parts_.size() == 1 && parts_[0].tokens < kSmallTokens; }
  const Stream& compute_stream() const { return streams_.for_rows(layout_.tokens); }
  const Stream& in_stream() const { return small() ? compute_stream() : streams_.inward; }
  const Stream& out_stream() const { return small() ? compute_stream() : streams_.outward; }
  uint8_t* host_in() const { return static_cast<uint8_t*>(pinned_in_.get()); }
  uint8_t* host_out() const { return static_cast<uint8_t*>(pinned_out_.get()); }
  uint32_t* words() const { return static_cast<uint32_t*>(pinned_words_.get()); }
  uint32_t read(size_t word) const { return std::atomic_ref(words()[word]).load(std::memory_order_acquire); }
  void write(size_t word, uint32_t value);
  void mark(const Event& event, const Stream& stream);
  void wait(const Stream& stream, const Event& event);

  static Addresses addresses_in(DevicePointer in, DevicePointer out, const Layout& layout,
                                const std::array<DevicePointer, 4>& layer);
  Addresses addresses_of(size_t part) const;
  Own own_rows(const Batch& batch, const Cut& cut, bool express) const;
  // Says how much of it one copy of the device stages.
  static void limit(Way& way, size_t piece_bytes);
  void plan(const Batch& batch, size_t part);
  template <typename Add>
  static void plan_rows(const Batch& batch, uint32_t first, uint32_t end, size_t row, const Add& add);
  void plan_routing(const Batch& batch, const Part& part, uint8_t* to, std::vector<Copy>* copies) const;
  void copy(Piece& piece, const Way& way);
  void move_in(Piece& piece);
  void move_out(Piece& piece);
  void move_columns(size_t part, size_t step, size_t steps);
  void compute(size_t part, Steps& steps);
  void launch(Graph& graph, const Addresses& at);

  const Driver& driver_;
  const Streams& streams_;
  PinnedMemory pinned_in_, pinned_out_, pinned_words_;
  DeviceMemory device_in_, device_out_;
  // Begin and end of copying in the first part, computing all and copying out the last; a small batch's stages end
  // where the next begin.
  std::array<Event, 6> marks_;
  Event arrived_, computed_;  // between streams, of the other parts and steps

  // Where the device has what goes out.
  DevicePointer outward_ = 0;
  Layout layout_;
  std::array<DevicePointer, 4> layer_{};
  Own own_;
  uint32_t ticket_ = 0;  // what the end word will be
  bool timed_ = false;
  std::array<bool, 3> marked_{};
  Copier* copier_ = nullptr;

  std::vector<Part> parts_;
  Way in_, out_;
  size_t part_ = 0;                   // the first that is not enqueued
  bool begun_ = false;                // whether anything is
  std::vector<Piece*> fetches_;       // those of the way out that have copies, in the order in which they come
  size_t sent_ = 0, fetched_ = 0;     // how many of those are enqueued, are copied or being copied
  std::vector<const Piece*> copies_;  // being copied
};

}  // namespace expertd::cuda
