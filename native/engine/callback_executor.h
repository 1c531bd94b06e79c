// Batches for threads outside: for backends without graphs.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>

#include "base/owned.h"
#include "engine/batch.h"
#include "engine/pile.h"

namespace expertd {

// Batches for threads outside that fetch them, compute them by their own means and give them back.
class CallbackExecutor : public Executor, public Owned, public std::enable_shared_from_this<CallbackExecutor> {
 public:
  explicit CallbackExecutor(size_t depth, bool express = false) : depth_(depth), express_(express) {}

  size_t depth() const override { return depth_; }
  bool has_express() const override { return express_; }
  void start(std::unique_ptr<Batch> batch, uint64_t now_ns) override;
  std::unique_ptr<Batch> poll(uint64_t now_ns) override;

  // From the threads outside: blocks until there is a batch, or null after interrupt().
  std::unique_ptr<Batch> fetch();
  // Lets one fetch() return without a batch, now or when it comes.
  void interrupt();
  // Gives a batch back, its jobs' replies written or its failure set.
  void give_back(std::unique_ptr<Batch> batch);

 private:
  const size_t depth_;
  const bool express_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::unique_ptr<Batch>> ready_;
  size_t interrupts_ = 0;
  Pile<std::unique_ptr<Batch>> done_;
  std::deque<std::unique_ptr<Batch>> taken_;  // of done_, by the engine's thread
};

}  // namespace expertd
