// The CUDA executor's Python face: for who captures its graphs, and computes with it until an engine takes it.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "base/owned.h"
#include "cuda/executor.h"

namespace expertd::cuda {

// A batch that Python started. All but `back` is touched with Python's lock only.
struct PyRun {
  pybind11::object keep;         // what the requests' memory belongs to
  std::unique_ptr<Batch> batch;  // once it is back
  std::atomic<bool> back{false};
  uint64_t started_ns = 0, ended_ns = 0;
};

// An executor in Python's hands. Any thread that has Python's lock may use it, until an engine takes it.
class PyExecutor : public Owned {
 public:
  PyExecutor(const Driver& driver, CudaExecutor::Options options, std::shared_ptr<Copier> copier)
      : executor_(std::make_unique<CudaExecutor>(driver, std::move(options), std::move(copier))) {}
  // What is under way keeps its memory.
  ~PyExecutor();
  PyExecutor(const PyExecutor&) = delete;
  PyExecutor& operator=(const PyExecutor&) = delete;

  // Throws std::runtime_error once an engine has it.
  CudaExecutor& executor() const;
  // For an engine, which alone uses it from then on. Waits for what is under way.
  std::unique_ptr<CudaExecutor> take();

  std::shared_ptr<PyRun> start(std::unique_ptr<Batch> batch, pybind11::object keep);
  // Until a batch is back. Throws `DeviceError` if it failed.
  void wait(PyRun& run);
  // Until none is under way.
  void drain();

 private:
  // One that is over; null after some milliseconds, or when `back` is set. Without Python's lock.
  std::unique_ptr<Batch> poll(const std::atomic<bool>& back);
  void settle(std::unique_ptr<Batch> batch);

  std::unique_ptr<CudaExecutor> executor_;
  std::mutex mutex_;  // of its use
  std::unordered_map<const Batch*, std::shared_ptr<PyRun>> runs_;
};

// expertd.kernels.cutile.run says how it is used.
void bind_cuda(pybind11::module_& module);

}  // namespace expertd::cuda
