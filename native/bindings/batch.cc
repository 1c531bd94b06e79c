// The Python face of batches that Python's threads compute.

#include "engine/batch.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/owned.h"
#include "bindings/unlocked.h"
#include "engine/callback_executor.h"

namespace py = pybind11;

namespace expertd {
namespace {

py::memoryview view(std::string_view bytes) {
  return py::memoryview::from_memory(bytes.data(), static_cast<py::ssize_t>(bytes.size()));
}

// A batch in the hands of a Python thread.
class PyBatch {
 public:
  PyBatch(std::unique_ptr<Batch> batch, std::shared_ptr<CallbackExecutor> executor)
      : batch_(std::move(batch)), executor_(std::move(executor)) {}
  ~PyBatch() {
    if (!batch_) return;
    executor_->here() ? fail("the batch was dropped", false) : (void)batch_.release();
  }
  PyBatch(PyBatch&&) = default;

  const Batch& batch() const {
    if (!batch_) throw py::value_error("the batch was given back");
    return *batch_;
  }

  // (hidden, scales or None, local ids, weights, place of the sums, tokens) of every request: views of memory that is
  // lent until the batch is given back.
  py::list requests() const {
    py::list requests;
    for (const auto& job : batch().jobs) {
      const Admitted& request = job->request;
      const std::string_view ids(reinterpret_cast<const char*>(request.local_ids.data()), 4 * request.local_ids.size());
      const auto sums = py::memoryview::from_memory(static_cast<void*>(job->sums),
                                                    static_cast<py::ssize_t>(request.computed_bytes()));
      requests.append(py::make_tuple(view(request.hidden),
                                     request.scales.empty() ? py::object(py::none()) : view(request.scales), view(ids),
                                     view(request.weights), sums, request.tokens));
    }
    return requests;
  }

  // Gives the batch back with all sums in their places: the pairs that the device counted, and its seconds.
  void finish(std::vector<uint32_t> pairs, double copy_in, double compute, double copy_out) {
    batch();
    batch_->pairs = std::move(pairs);
    batch_->seconds = {copy_in, compute, copy_out};
    executor_->give_back(std::move(batch_));
  }

  // Gives the batch back without sums; `device_failed`: the device may be at fault, so that it must be looked at.
  void fail(std::string text, bool device_failed) {
    batch();
    batch_->failure = Refusal{Code::kInternal, std::move(text)};
    batch_->device_failed = device_failed;
    executor_->give_back(std::move(batch_));
  }

 private:
  std::unique_ptr<Batch> batch_;
  std::shared_ptr<CallbackExecutor> executor_;
};

}  // namespace

void bind_batch(py::module_& module) {
  py::class_<PyBatch>(module, "Batch")
      .def_property_readonly("weights_key", [](const PyBatch& b) { return b.batch().first().owned->key; })
      .def_property_readonly("top_k", [](const PyBatch& b) { return b.batch().first().top_k; })
      .def_property_readonly("hidden_dtype",
                             [](const PyBatch& b) { return static_cast<int>(b.batch().first().hidden_dtype); })
      .def_property_readonly("sums_dtype",
                             [](const PyBatch& b) { return static_cast<int>(b.batch().first().sums_dtype()); })
      .def_property_readonly("tokens", [](const PyBatch& b) { return b.batch().tokens; })
      .def_property_readonly("alone", [](const PyBatch& b) { return b.batch().alone; })
      .def("requests", &PyBatch::requests)
      .def("finish", &PyBatch::finish)
      .def("fail", &PyBatch::fail, py::arg("text"), py::kw_only(), py::arg("device_failed") = false);

  py::class_<Executor, std::shared_ptr<Executor>>(module, "Executor").def_property_readonly("depth", &Executor::depth);

  py::class_<CallbackExecutor, Executor, std::shared_ptr<CallbackExecutor>>(module, "CallbackExecutor")
      .def(py::init<size_t, bool>(), py::arg("depth"), py::kw_only(), py::arg("express") = false)
      .def("fetch",
           [](CallbackExecutor& executor) -> std::optional<PyBatch> {
             std::unique_ptr<Batch> batch;
             {
               const Unlocked unlocked;
               batch = executor.fetch();
             }
             if (!batch) return std::nullopt;
             return PyBatch(std::move(batch), executor.shared_from_this());
           })
      .def("interrupt", [](CallbackExecutor& executor) { executor.interrupt(); });
}

}  // namespace expertd
