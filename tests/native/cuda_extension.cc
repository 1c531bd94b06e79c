// The executor as tests drive it: one Python thread in the engine's place.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <tuple>

#include "bindings/cuda.h"
#include "cuda/adding.h"
#include "cuda/executor.h"
#include "engine/engine.h"
#include "engine/node.h"

namespace py = pybind11;

namespace expertd::cuda {
namespace {

// Makes copies when it is told to.
class HeldCopier : public Copier {
 public:
  void start(const std::vector<Copy>& copies, std::atomic<bool>* done) override {
    waiting_.push_back({&copies, done});
    if (!held_) go();
  }
  void hold(bool held) { held_ = held; }
  size_t waiting() const { return waiting_.size(); }
  void go() {
    for (auto [copies, done] : std::exchange(waiting_, {})) {
      for (const Copy& copy : *copies) copy.make();
      done->store(true, std::memory_order_release);
      tell();
    }
  }
  // The first of those that wait alone.
  void go_one() {
    auto [copies, done] = waiting_.front();
    waiting_.erase(waiting_.begin());
    for (const Copy& copy : *copies) copy.make();
    done->store(true, std::memory_order_release);
  }

 private:
  bool held_ = false;
  std::vector<std::pair<const std::vector<Copy>*, std::atomic<bool>*>> waiting_;
};

class Request final : public Job {
 public:
  void make_room() override { put_reply(reply); }
  void complete() override {}
  bool is_slow() const override { return false; }
  void settle(Outcome outcome) override {
    text = outcome.refusal ? outcome.refusal->text : "";
    answered = true;
  }

  std::string text;
  std::atomic<bool> answered{false};
};

// A batch, as its maker sees it.
struct TestJob {
  std::unique_ptr<Batch> own;  // when the executor does not have it
  Batch* batch = nullptr;
  py::object keep;  // what the parts' memory belongs to
};

using Part = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uint32_t, int>;

std::shared_ptr<Request> request_of(const Part& part, const Admitted& like) {
  const auto& [hidden, scales, ids, weights, sums, tokens, reach] = part;
  auto bytes = [](uintptr_t at, size_t count) { return std::string_view(reinterpret_cast<const char*>(at), count); };
  auto request = std::make_shared<Request>();
  const size_t width = like.placement->hidden_size;
  Admitted& admitted = request->request = like;
  admitted.tokens = tokens;
  admitted.hidden = bytes(hidden, tokens * width * size_of(like.hidden_dtype));
  admitted.scales = bytes(scales, like.hidden_dtype == Dtype::kFloat8E4M3FN ? 4 * tokens * (width / 128) : 0);
  admitted.weights = bytes(weights, 4 * size_t{tokens} * like.top_k);
  auto first = reinterpret_cast<const int32_t*>(ids);
  admitted.local_ids.assign(first, first + size_t{tokens} * like.top_k);
  request->reach = static_cast<Reach>(reach);
  request->sums = request->reply = reinterpret_cast<std::byte*>(sums);
  return request;
}

struct Rig {
  Rig(const std::string& library, int device, size_t depth, std::array<uint32_t, 3> shape,
      std::vector<uint32_t> classes, uint32_t time_every, uint32_t max_tokens, uint32_t overlap, size_t piece,
      uint32_t express)
      : driver(Driver::load(library.c_str())), copier(std::make_shared<HeldCopier>()) {
    CudaExecutor::Options options{
        device, depth, {shape[0], shape[1], shape[2]}, classes, max_tokens, overlap, time_every, piece, express};
    if (!max_tokens) options.max_tokens = classes.back();
    python = std::make_unique<PyExecutor>(driver, options, copier);
  }
  CudaExecutor& executor() { return python->executor(); }

  const Driver driver;
  std::shared_ptr<HeldCopier> copier;
  std::unique_ptr<PyExecutor> python;
  std::map<const Batch*, TestJob*> jobs;
};

constexpr uint32_t kMaxExperts = 64;  // of any rig

PlacementPtr placement_of(uint32_t hidden_size, const std::array<uint64_t, 4>& weights) {
  Placement placement;
  placement.layers = {{.layer = 7, .weights = weights}};
  for (uint32_t expert = 0; expert < kMaxExperts; ++expert) placement.layers.front().experts.push_back(expert);
  placement.num_routed_experts = kMaxExperts;
  placement.hidden_size = hidden_size;
  return make_placement(std::move(placement));
}

// Requests of that placement.
void use(PlacementPtr placement, Admitted* request) {
  request->owned = &placement->layers.front();
  request->layer = request->owned->layer;
  request->placement = std::move(placement);
}

// What several rigs have of one layer: for each, the local ids that it computes, and where it has their weights.
using Devices = std::vector<std::pair<std::vector<uint32_t>, std::array<uint64_t, 4>>>;

PlacementPtr spread_placement_of(uint32_t hidden_size, const Devices& devices) {
  Placement placement = *placement_of(hidden_size, std::array<uint64_t, 4>{});
  for (const auto& [experts, weights] : devices)
    placement.layers.front().devices.push_back({.layer = 7, .experts = experts, .weights = weights});
  return make_placement(std::move(placement));
}

// An engine that took a rig's executor.
struct EngineRig {
  EngineRig(Rig& rig, const std::array<uint64_t, 4>& weights, uint32_t hidden_size)
      : EngineRig(placement_of(hidden_size, weights), rig.python->take()) {}
  // Several rigs as one.
  EngineRig(const std::vector<Rig*>& rigs, const Devices& devices, uint32_t hidden_size)
      : EngineRig(spread_placement_of(hidden_size, devices), node_of(rigs)) {}
  EngineRig(PlacementPtr owned, std::shared_ptr<NodeExecutor> executor)
      : EngineRig(std::move(owned), std::shared_ptr<Executor>(executor)) {
    node = std::move(executor);
  }
  EngineRig(PlacementPtr owned, std::shared_ptr<Executor> executor) : placement(std::move(owned)) {
    engine = std::make_unique<Engine>(placement, 512, Amount{10'000, 1 << 30},
                                      std::make_shared<Tally>(std::vector<uint32_t>{7}, kMaxExperts,
                                                              std::vector<double>{1.0}, std::vector<double>{1.0}));
    engine->use(std::move(executor));
    engine->open();
  }
  static std::shared_ptr<NodeExecutor> node_of(const std::vector<Rig*>& rigs) {
    std::vector<std::shared_ptr<Executor>> executors;
    for (Rig* rig : rigs) executors.push_back(rig->python->take());
    auto adder = PeerAdder::make(executors);
    return std::make_shared<NodeExecutor>(std::move(executors), nullptr, std::move(adder));
  }
  ~EngineRig() {
    const py::gil_scoped_release unlocked;
    engine.reset();
  }

  std::shared_ptr<Request> submit(const Part& part, uint8_t hidden, uint8_t reply, uint32_t top_k, uint32_t experts) {
    Admitted like;
    use(placement, &like);
    like.top_k = top_k;
    like.hidden_dtype = static_cast<Dtype>(hidden), like.reply_dtype = static_cast<Dtype>(reply);
    auto request = request_of(part, like);
    request->request.pairs.resize(experts);
    for (int32_t id : request->request.local_ids)
      if (id >= 0) request->request.pairs[id]++;
    if (auto refusal = engine->submit(request)) throw std::runtime_error(refusal->text);
    return request;
  }

  PlacementPtr placement;
  std::shared_ptr<NodeExecutor> node;  // null with one rig
  std::unique_ptr<Engine> engine;
};

}  // namespace

PYBIND11_MODULE(cuda_extension, module) {
  py::class_<Executor, std::shared_ptr<Executor>>(module, "Executor");
  bind_cuda(module);
  py::class_<TestJob>(module, "Job")
      .def(py::init([](uint8_t hidden, uint8_t reply, uint32_t top_k, std::vector<Part> parts,
                       std::array<uint64_t, 4> weights, uint32_t hidden_size, py::object keep) {
        auto job = std::make_unique<TestJob>();
        job->own = std::make_unique<Batch>();
        job->batch = job->own.get();
        Admitted like;
        use(placement_of(hidden_size, weights), &like);
        like.top_k = top_k;
        like.hidden_dtype = static_cast<Dtype>(hidden), like.reply_dtype = static_cast<Dtype>(reply);
        for (auto& part : parts) {
          job->batch->jobs.push_back(request_of(part, like));
          job->batch->tokens += job->batch->jobs.back()->tokens();
        }
        job->keep = std::move(keep);
        return job;
      }))
      .def("forget_weights",
           [](TestJob& job) {
             for (auto& request : job.batch->jobs) use(placement_of(0, {}), &request->request);
           })
      .def_property_readonly("pairs", [](const TestJob& job) { return job.batch->pairs; })
      .def_property_readonly("error",
                             [](const TestJob& job) { return job.batch->failure ? job.batch->failure->text : ""; })
      .def_property_readonly("device_lost", [](const TestJob& job) { return job.batch->device_failed; })
      .def_property_readonly("measured", [](const TestJob& job) { return job.batch->seconds.measured; })
      .def_property_readonly("timings", [](const TestJob& job) {
        const DeviceSeconds& its = job.batch->seconds;
        return std::array{its.copy_in, its.compute, its.copy_out};
      });
  py::class_<Request, std::shared_ptr<Request>>(module, "EngineRequest")
      .def_property_readonly("answered", [](const Request& request) { return request.answered.load(); })
      .def_property_readonly("error", [](const Request& request) { return request.text; });
  py::class_<EngineRig>(module, "EngineRig")
      .def(py::init<Rig&, const std::array<uint64_t, 4>&, uint32_t>())
      .def(py::init<const std::vector<Rig*>&, const Devices&, uint32_t>())
      .def_property_readonly("adds_on_devices", [](EngineRig& rig) { return rig.node->adds_on_devices(); })
      .def("lose", [](EngineRig& rig, size_t device, bool hangs) { rig.node->lose(device, hangs); })
      .def("take_fault", [](EngineRig& rig) { return rig.engine->take_fault(); })
      .def("submit", &EngineRig::submit)
      .def("start", [](EngineRig& rig) { rig.engine->start(); })
      .def("turn", [](EngineRig& rig, uint64_t now) { return rig.engine->turn(now); });
  py::class_<Rig>(module, "Rig")
      .def(py::init<const std::string&, int, size_t, std::array<uint32_t, 3>, std::vector<uint32_t>, uint32_t, uint32_t,
                    uint32_t, size_t, uint32_t>(),
           py::arg("library"), py::arg("device"), py::arg("depth"), py::arg("shape"), py::arg("classes"),
           py::arg("time_every") = 1, py::arg("max_tokens") = 0, py::arg("overlap_tokens") = 4096,
           py::arg("piece_bytes") = 1 << 20, py::arg("express_rows") = 256)
      .def_property_readonly(
          "executor", [](Rig& rig) { return rig.python.get(); }, py::return_value_policy::reference_internal)
      .def("close", [](Rig& rig) { rig.python.reset(); })
      .def("start",
           [](Rig& rig, TestJob* job, uint64_t now) {
             rig.jobs[job->batch] = job;
             rig.executor().start(std::move(job->own), now);
           })
      .def(
          "poll",
          [](Rig& rig, uint64_t now) -> TestJob* {
            auto batch = rig.executor().poll(now);
            if (!batch) return nullptr;
            TestJob* job = rig.jobs.at(batch.get());
            rig.jobs.erase(batch.get());
            job->own = std::move(batch);
            return job;
          },
          py::return_value_policy::reference)
      .def("due", [](Rig& rig) { return rig.executor().due_ns(); })
      .def("on_done", [](Rig& rig, std::function<void()> wake) { rig.executor().on_done(std::move(wake)); })
      .def("resume", [](Rig& rig) { return rig.executor().resume(); })
      .def("hold_copies", [](Rig& rig, bool held) { rig.copier->hold(held); })
      .def("held_copies", [](Rig& rig) { return rig.copier->waiting(); })
      .def("go_copies", [](Rig& rig) { rig.copier->go(); })
      .def("go_copy", [](Rig& rig) { rig.copier->go_one(); });
}

}  // namespace expertd::cuda
