// The executor as tests and measurements drive it: one Python thread in the engine's place.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>

#include "bindings/cuda.h"
#include "cuda/executor.h"

namespace py = pybind11;

namespace expertd::cuda {
namespace {

// Makes copies when it is told to.
class HeldCopier : public Copier {
 public:
  void start(const std::vector<Copy>& copies, std::atomic<bool>* done) override {
    if (!held_) return make(copies, done);
    waiting_.push_back({&copies, done});
  }
  void hold(bool held) { held_ = held; }
  size_t waiting() const { return waiting_.size(); }
  void go() {
    for (auto [copies, done] : std::exchange(waiting_, {})) make(*copies, done);
  }

 private:
  static void make(const std::vector<Copy>& copies, std::atomic<bool>* done) {
    for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
    done->store(true, std::memory_order_release);
  }
  bool held_ = false;
  std::vector<std::pair<const std::vector<Copy>*, std::atomic<bool>*>> waiting_;
};

struct Job {
  Batch batch;
  py::object keep;  // what the parts' memory belongs to
};

struct Rig {
  Rig(const std::string& library, int device, size_t depth, std::array<uint32_t, 3> shape,
      std::vector<uint32_t> classes, uint32_t time_every)
      : driver(Driver::load(library.c_str())),
        executor(std::make_unique<CudaExecutor>(
            driver, CudaExecutor::Options{device, depth, {shape[0], shape[1], shape[2]}, std::move(classes), time_every},
            &copier)) {}

  const Driver driver;
  HeldCopier copier;
  std::unique_ptr<CudaExecutor> executor;
};

Part part_of(const py::tuple& from) {
  auto at = [&](size_t i) { return from[i].cast<uintptr_t>(); };
  return {reinterpret_cast<const uint8_t*>(at(0)), reinterpret_cast<const float*>(at(1)),
          reinterpret_cast<const int32_t*>(at(2)), reinterpret_cast<const float*>(at(3)),
          reinterpret_cast<uint8_t*>(at(4)),       from[5].cast<uint32_t>(),
          from[6].cast<bool>()};
}

uint64_t clock_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<uint64_t>(time.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(time.tv_nsec);
}

}  // namespace

PYBIND11_MODULE(cuda_extension, module) {
  bind_cuda(module);
  py::class_<Job>(module, "Job")
      .def(py::init([](uint8_t hidden, uint8_t reply, uint32_t top_k, std::vector<py::tuple> parts,
                       std::array<uint64_t, 4> weights, py::object keep) {
             auto job = std::make_unique<Job>();
             Batch& batch = job->batch;
             batch.hidden_dtype = hidden, batch.reply_dtype = reply, batch.top_k = top_k, batch.weights = weights;
             for (auto& part : parts) batch.parts.push_back(part_of(part));
             for (auto& part : batch.parts) batch.tokens += part.tokens;
             batch.owner = job.get();
             job->keep = std::move(keep);
             return job;
           }))
      .def_property_readonly("pairs", [](const Job& job) { return job.batch.pairs; })
      .def_property_readonly("error", [](const Job& job) { return job.batch.error; })
      .def_property_readonly("device_lost", [](const Job& job) { return job.batch.device_lost; })
      .def_property_readonly("measured", [](const Job& job) { return job.batch.timings.measured; })
      .def_property_readonly("timings", [](const Job& job) {
        const Timings& timings = job.batch.timings;
        return std::array{timings.copy_in, timings.compute, timings.copy_out};
      });
  py::class_<Rig>(module, "Rig")
      .def(py::init<const std::string&, int, size_t, std::array<uint32_t, 3>, std::vector<uint32_t>, uint32_t>(),
           py::arg("library"), py::arg("device"), py::arg("depth"), py::arg("shape"), py::arg("classes"),
           py::arg("time_every") = 1)
      .def_property_readonly("executor", [](Rig& rig) { return rig.executor.get(); }, py::return_value_policy::reference_internal)
      .def("close", [](Rig& rig) { rig.executor.reset(); })
      .def("start", [](Rig& rig, Job* job, uint64_t now) { rig.executor->start(&job->batch, now); })
      .def("poll",
           [](Rig& rig, uint64_t now) -> Job* {
             Batch* batch = rig.executor->poll(now);
             return batch ? static_cast<Job*>(batch->owner) : nullptr;
           },
           py::return_value_policy::reference)
      .def("due", [](Rig& rig) { return rig.executor->due_ns(); })
      .def("resume", [](Rig& rig) { return rig.executor->resume(); })
      .def("hold_copies", [](Rig& rig, bool held) { rig.copier.hold(held); })
      .def("held_copies", [](Rig& rig) { return rig.copier.waiting(); })
      .def("go_copies", [](Rig& rig) { rig.copier.go(); })
      // Starts a job and spins until it is back: the seconds that it took.
      .def("compute", [](Rig& rig, Job* job) {
        py::gil_scoped_release unlocked;
        uint64_t begin = clock_ns();
        rig.executor->start(&job->batch, begin);
        while (!rig.executor->poll(clock_ns())) {
        }
        return static_cast<double>(clock_ns() - begin) * 1e-9;
      });
}

}  // namespace expertd::cuda
