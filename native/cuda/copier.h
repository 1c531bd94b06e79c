// Copies between host memory that would hold up the engine's thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "base/waker.h"

namespace expertd::cuda {

// Bytes that go from one place to another.
struct Copy {
  void* to;
  const void* from;  // null: only `fill` is written
  size_t bytes;      // at `to`
  uint8_t fill = 0;
  size_t row = 0, padded_row = 0;  // unless 0: rows of `row` bytes become rows of `padded_row`, the rest being `fill`

  void make() const noexcept;
};

// Makes copies on other threads.
class Copier {
 public:
  virtual ~Copier() = default;
  // Begins `copies`; once all are made, stores true in `*done` (release), the last that it touches. Never blocks.
  virtual void start(const std::vector<Copy>& copies, std::atomic<bool>* done) = 0;

  // `wake` is called after each end, on any thread; not any more once another one is given.
  void on_done(std::function<void()> wake) { waker_.set(std::move(wake)); }

 protected:
  void tell() { waker_.wake(); }

 private:
  Waker waker_;
};

// Makes copies on the process's pool.
class PoolCopier final : public Copier, public std::enable_shared_from_this<PoolCopier> {
 public:
  void start(const std::vector<Copy>& copies, std::atomic<bool>* done) override;
};

}  // namespace expertd::cuda
