// What one device batch occupies: pinned and device memory, streams, events, and the word that tells its end.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "cuda/batch.h"
#include "cuda/driver.h"
#include "cuda/layout.h"
#include "cuda/ledger.h"

namespace expertd::cuda {

// Batches of fewer tokens than this are copied in, computed and copied out on one stream.
inline constexpr uint32_t kSmallTokens = 256;
// Rows of a request in pinned memory that are more bytes than this are copied by the device from where they are.
inline constexpr size_t kDirectBytes = 64 << 10;

// No copy of the device crosses a multiple of this in a request's memory: it is pinned step by step, at multiples of
// it.
inline constexpr size_t kPinStep = 2 << 20;

// Batches compute one after another, in memory that they share, while others are copied in and out.
struct Streams {
  explicit Streams(const Driver& driver)
      : inward(make_stream(driver)), compute(make_stream(driver)), outward(make_stream(driver)) {}
  // Whether all that was asked for is done, without an error.
  bool idle(const Driver& driver) const;

  Stream inward, compute, outward;
};

// What one device batch occupies: pinned and device memory, events, and a word that tells its end. All of it is
// allocated before serving. Holds one batch at a time; nothing here waits for the device.
class Bay {
 public:
  // `largest`: the largest layout of its batches in either direction.
  Bay(const Driver& driver, const Streams& streams, const Layout& largest);

  // The addresses on the device of a batch laid out like this, with those of a layer's four weights.
  Addresses addresses(const Layout& layout, const std::array<DevicePointer, 4>& layer) const;
  DevicePointer inward() const { return device_in_.get(); }
  DevicePointer outward() const { return device_out_.get(); }

  // Takes a batch: fills in what no request brings, and lists the copies to be made before `launch`.
  const std::vector<Copy>& stage(const Batch& batch, const Layout& layout);
  // Enqueues everything up to the end word. With `timed`, a small batch too records its stages. Throws `DeviceError`.
  void launch(const Batch& batch, Graph& graph, bool timed);
  // Whether the device has written the end word.
  bool ended() const;
  // After the end: the counts of pairs, and the copies to be made before the batch is finished.
  const std::vector<Copy>& fetch(Batch* batch);
  // The stages of a batch that ended, if they were recorded.
  void read_timings(Timings* timings) const;

  // The state of the stream that the batch ends on: success once all of it is done.
  int query() const { return driver_.cuStreamQuery(last_stream()); }
  // After a launch that failed: marks how far the streams had got by then.
  void mark_failed();
  // After `mark_failed`: success once the device uses none of the batch's memory, not ready until then, or its error.
  int query_failed() const;
  // Lets go of all memory, which the device may yet use.
  void abandon();

 private:
  // Bytes that one copy moves between memory of the host and the bay's on the device, at `offset`.
  struct Stretch {
    size_t offset;
    uint8_t* host;
    size_t bytes;
    bool staged;  // the bay's own pinned memory
  };

  bool small() const { return tokens_ < kSmallTokens; }
  void* last_stream() const { return small() ? streams_.compute.get() : streams_.outward.get(); }
  uint8_t* host_in() const { return static_cast<uint8_t*>(pinned_in_.get()); }
  uint8_t* host_out() const { return static_cast<uint8_t*>(pinned_out_.get()); }
  uint32_t* word() const { return static_cast<uint32_t*>(pinned_word_.get()); }
  void mark(size_t index, const Stream& stream);
  void copy_in(const Batch& batch, void* stream);
  void copy_out(const Batch& batch, void* stream);
  void stage_routing(const Batch& batch);

  // Lists stretches: what precedes the rows, and the rows, which are `memory(part)` or staged.
  template <typename Memory>
  void plan(const Batch& batch, uint8_t* staging, size_t prefix, size_t row, Memory memory);

  const Driver& driver_;
  const Streams& streams_;
  PinnedMemory pinned_in_, pinned_out_, pinned_word_;
  DeviceMemory device_in_, device_out_;
  // Begin and end of copying in, computing and copying out; a small batch's stages end where the next begin.
  std::array<Event, 6> marks_;

  Layout layout_;
  uint32_t tokens_ = 0;
  uint32_t ticket_ = 0;  // what the end word will be
  bool timed_ = false;
  std::array<bool, 3> marked_{};
  std::vector<Copy> copies_;
  std::vector<Stretch> stretches_;
};

}  // namespace expertd::cuda
