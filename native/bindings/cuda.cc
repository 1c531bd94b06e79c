#include "bindings/cuda.h"

#include <pybind11/stl.h>
#include <time.h>

#include <map>
#include <optional>
#include <string>
#include <utility>

#include "base/clock.h"
#include "bindings/owned.h"
#include "bindings/unlocked.h"
#include "cuda/adding.h"

namespace py = pybind11;

namespace expertd::cuda {

namespace {

constexpr uint64_t kSpinNs = 2'000'000, kPatienceNs = 20'000'000;
constexpr timespec kNap = {0, 50'000};

// A request of who called from Python; there is nobody else to tell.
class PyRequest final : public Job {
 public:
  void make_room() override {}
  void complete() override {}
  bool is_slow() const override { return false; }
  void settle(Outcome) override {}
};

// Addresses of hidden states, scales (0: none), ids and weights, and where the sums go; tokens; how the device reaches
// the first two and the last: the values of `Reach`.
using RequestAt = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uint32_t, uint8_t>;

std::string_view bytes_at(uintptr_t address, size_t count) { return {reinterpret_cast<const char*>(address), count}; }

std::shared_ptr<Job> job_of(const RequestAt& at, const Admitted& like, const Layout& layout) {
  const auto& [hidden, scales, ids, weights, sums, tokens, reach] = at;
  auto job = std::make_shared<PyRequest>();
  job->request = like;
  job->request.tokens = tokens;
  job->request.hidden = bytes_at(hidden, tokens * layout.hidden_row());
  job->request.scales = bytes_at(scales, tokens * layout.scales_row());
  job->request.weights = bytes_at(weights, 4 * size_t{tokens} * like.top_k);
  auto first = reinterpret_cast<const int32_t*>(ids);
  job->request.local_ids.assign(first, first + size_t{tokens} * like.top_k);
  job->reach = static_cast<Reach>(reach);
  job->sums = reinterpret_cast<std::byte*>(sums);
  return job;
}

std::unique_ptr<Batch> batch_of(const CudaExecutor& executor, const std::array<uint64_t, 4>& layer, Dtype hidden,
                                Dtype reply, uint32_t top_k, const std::vector<RequestAt>& requests) {
  Placement placement;
  placement.layers = {{.weights = layer}};
  Admitted like;
  like.placement = make_placement(std::move(placement));
  like.owned = &like.placement->layers.front();
  like.top_k = top_k, like.hidden_dtype = hidden, like.reply_dtype = reply;
  auto batch = std::make_unique<Batch>();
  for (const RequestAt& request : requests) {
    batch->jobs.push_back(job_of(request, like, executor.layout(0, hidden, reply)));
    batch->tokens += batch->jobs.back()->tokens();
  }
  if (batch->jobs.empty()) throw py::value_error("a batch has a request");
  return batch;
}

std::map<std::string, DevicePointer> places(const CudaExecutor& executor, size_t bay, const Layout& layout) {
  const Addresses at = executor.addresses(bay, layout);
  return {{"ids", at[0]}, {"weights", at[1]}, {"hidden", at[2]}, {"scales", at[3]}, {"sums", at[4]}, {"pairs", at[5]}};
}

std::unique_ptr<PyExecutor> make_executor(int device, size_t depth, uint32_t hidden_size, uint32_t num_experts,
                                          uint32_t max_top_k, std::vector<uint32_t> classes, uint32_t max_tokens,
                                          std::optional<uint32_t> overlap_tokens, uint32_t time_every,
                                          uint32_t express_rows) {
  static const Driver driver = Driver::load();  // not before somebody wants it; its library stays
  CudaExecutor::Options options;
  options.device = device, options.depth = depth;
  options.shape = {hidden_size, num_experts, max_top_k};
  options.classes = std::move(classes), options.max_tokens = max_tokens;
  options.time_every = time_every, options.express_rows = express_rows;
  if (overlap_tokens) options.overlap_tokens = *overlap_tokens;
  return std::make_unique<PyExecutor>(driver, std::move(options), std::make_shared<PoolCopier>());
}

}  // namespace

PyExecutor::~PyExecutor() {
  for (auto& [batch, run] : runs_) run->keep.release();
  // The device is the parent's.
  if (!here()) executor_.release();
}

CudaExecutor& PyExecutor::executor() const {
  if (!executor_) throw std::runtime_error("an engine has the executor");
  return *executor_;
}

std::unique_ptr<CudaExecutor> PyExecutor::take() {
  drain();
  executor();
  return std::move(executor_);
}

std::shared_ptr<PyRun> PyExecutor::start(std::unique_ptr<Batch> batch, py::object keep) {
  executor();
  auto run = std::make_shared<PyRun>();
  run->keep = std::move(keep);
  run->started_ns = monotonic_ns();
  runs_.emplace(batch.get(), run);
  const std::lock_guard lock(mutex_);
  executor_->start(std::move(batch), run->started_ns);
  return run;
}

void PyExecutor::wait(PyRun& run) {
  while (!run.back) {
    std::unique_ptr<Batch> batch;
    {
      const Unlocked unlocked;
      batch = poll(run.back);
    }
    if (batch) settle(std::move(batch));
    if (PyErr_CheckSignals()) throw py::error_already_set();
  }
  if (run.batch->failure) throw DeviceError(run.batch->failure->text);
}

void PyExecutor::drain() {
  while (!runs_.empty()) {
    const std::shared_ptr<PyRun> run = runs_.begin()->second;
    try {
      wait(*run);
    } catch (const DeviceError&) {
      // Its owner is told.
    }
  }
}

std::unique_ptr<Batch> PyExecutor::poll(const std::atomic<bool>& back) {
  const uint64_t begin = monotonic_ns();
  executor().enter();
  while (!back) {
    const uint64_t now = monotonic_ns();
    {
      const std::lock_guard lock(mutex_);
      if (auto batch = executor().poll(now)) return batch;
    }
    if (now - begin > kPatienceNs) break;
    if (now - begin > kSpinNs) nanosleep(&kNap, nullptr);
  }
  return nullptr;
}

void PyExecutor::settle(std::unique_ptr<Batch> batch) {
  const auto found = runs_.find(batch.get());
  const std::shared_ptr<PyRun> run = std::move(found->second);
  runs_.erase(found);
  run->ended_ns = monotonic_ns();
  run->keep = py::none();
  run->batch = std::move(batch);
  run->back = true;
}

void bind_cuda(py::module_& module) {
  py::register_exception<DeviceError>(module, "DeviceError", PyExc_RuntimeError);

  py::class_<PyRun, std::shared_ptr<PyRun>>(module, "CudaBatch")
      .def_property_readonly("pairs", [](const PyRun& run) { return run.batch->pairs; })
      .def_property_readonly("measured", [](const PyRun& run) { return run.batch->seconds.measured; })
      .def_property_readonly("seconds",
                             [](const PyRun& run) {
                               const DeviceSeconds& its = run.batch->seconds;
                               return py::make_tuple(its.copy_in, its.compute, its.copy_out);
                             })
      .def_property_readonly(
          "elapsed", [](const PyRun& run) { return static_cast<double>(run.ended_ns - run.started_ns) * 1e-9; });

  py::class_<PyExecutor>(module, "CudaExecutor")
      .def(py::init(&make_executor), py::arg("device"), py::kw_only(), py::arg("depth"), py::arg("hidden_size"),
           py::arg("num_experts"), py::arg("max_top_k"), py::arg("classes"), py::arg("max_tokens"),
           py::arg("overlap_tokens") = py::none(), py::arg("time_every") = 1, py::arg("express_rows") = 0)
      .def_property_readonly("depth", [](const PyExecutor& e) { return e.executor().depth(); })
      .def_property_readonly("classes", [](const PyExecutor& e) { return e.executor().options().classes; })
      .def_property_readonly("max_top_k", [](const PyExecutor& e) { return e.executor().options().shape.max_top_k; })
      .def_property_readonly("express_rows", [](const PyExecutor& e) { return e.executor().options().express_rows; })
      .def(
          "cut",
          [](const PyExecutor& e, uint32_t tokens, bool on_host) {
            const Cut its = e.executor().cut(tokens, on_host);
            return py::make_tuple(its.parts, its.tokens, its.rows);
          },
          py::arg("tokens"), py::arg("on_host"))
      .def(
          "places",
          [](const PyExecutor& e, size_t bay, uint32_t tokens, uint8_t hidden, uint8_t reply) {
            const auto layout = e.executor().layout(tokens, static_cast<Dtype>(hidden), static_cast<Dtype>(reply));
            return places(e.executor(), bay, layout);
          },
          py::arg("bay"), py::arg("tokens"), py::arg("hidden_dtype"), py::arg("reply_dtype"))
      .def(
          "add_graphs",
          [](PyExecutor& e, uint32_t tokens, uint8_t hidden, uint8_t reply, const std::vector<uintptr_t>& graphs,
             const std::array<std::pair<DevicePointer, size_t>, 4>& layer) {
            std::array<Range, 4> ranges;
            for (size_t i = 0; i < ranges.size(); i++) ranges[i] = {layer[i].first, layer[i].second};
            e.drain();
            const auto layout = e.executor().layout(tokens, static_cast<Dtype>(hidden), static_cast<Dtype>(reply));
            std::vector<void*> captured;
            for (const uintptr_t graph : graphs) captured.push_back(reinterpret_cast<void*>(graph));
            e.executor().add_graphs(layout, captured, ranges);
          },
          py::arg("tokens"), py::arg("hidden_dtype"), py::arg("reply_dtype"), py::arg("graphs"), py::arg("layer"))
      .def(
          "start",
          [](PyExecutor& e, const std::array<uint64_t, 4>& layer, uint8_t hidden, uint8_t reply, uint32_t top_k,
             const std::vector<RequestAt>& requests, py::object keep) {
            return e.start(
                batch_of(e.executor(), layer, static_cast<Dtype>(hidden), static_cast<Dtype>(reply), top_k, requests),
                std::move(keep));
          },
          py::arg("layer"), py::arg("hidden_dtype"), py::arg("reply_dtype"), py::arg("top_k"), py::arg("requests"),
          py::arg("keep"))
      .def("wait", [](PyExecutor& e, PyRun& run) { e.wait(run); })
      .def(
          "add_adder",
          [](PyExecutor& e, uint8_t dtype, uintptr_t graph, std::pair<DevicePointer, size_t> result,
             const std::vector<std::pair<DevicePointer, size_t>>& parts) {
            if (parts.size() < 2 || parts.size() > kMostParts) throw py::value_error("2 to 8 devices are added up");
            std::vector<Range> ranges;
            for (const auto& [address, bytes] : parts) ranges.push_back({address, bytes});
            e.drain();
            e.executor().add_adder(parts.size(), static_cast<Dtype>(dtype), reinterpret_cast<void*>(graph),
                                   {result.first, result.second}, ranges);
          },
          py::arg("dtype"), py::kw_only(), py::arg("graph"), py::arg("result"), py::arg("parts"))
      .def("take", [](PyExecutor& executor) -> std::shared_ptr<Executor> { return executor.take(); })
      .def("drain", &PyExecutor::drain);

  module.def(
      "peer_adder",
      [](const std::vector<std::shared_ptr<Executor>>& devices) -> std::shared_ptr<Adder> {
        return PeerAdder::make(devices);
      },
      py::arg("devices"));
}

}  // namespace expertd::cuda
