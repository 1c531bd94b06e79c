// Both ends of lanes, and what they stand on, for Python's tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>

#include "base/control_groups.h"
#include "base/spin.h"
#include "echo_server.h"

namespace py = pybind11;

namespace expertd {

void bind_lane(py::module_& module);

namespace testing {

struct Machine : SpinHost {
  double cpus = 64;
  int64_t preempted = 0, throttled = 0;
  double usable_cpus() override { return cpus; }
  int64_t preemptions() override { return preempted; }
  int64_t throttles() override { return throttled; }
};

}  // namespace testing
}  // namespace expertd

PYBIND11_MODULE(lane_testing, module) {
  using namespace expertd;
  using namespace expertd::testing;
  bind_lane(module);

  py::class_<EchoServer>(module, "EchoServer")
      .def(py::init())
      .def("add",
           [](EchoServer& server, std::shared_ptr<Mapping> memory, int socket) {
             std::string reason;
             server.add(std::move(memory), socket, &reason);
             return reason;
           })
      .def("turn", &EchoServer::turn, py::arg("timeout_ms") = 0, py::call_guard<py::gil_scoped_release>())
      .def("stop", &EchoServer::stop)
      .def_property_readonly("lanes", &EchoServer::lanes)
      .def_property_readonly("served", &EchoServer::served)
      .def_property_readonly("reasons", &EchoServer::reasons);

  py::class_<SpinHost>(module, "SpinHost");
  py::class_<Machine, SpinHost>(module, "Machine")
      .def(py::init())
      .def_readwrite("cpus", &Machine::cpus)
      .def_readwrite("preempted", &Machine::preempted)
      .def_readwrite("throttled", &Machine::throttled)
      .def_property_readonly("spinning", [](const Machine& machine) { return machine.spinning.load(); });
  py::class_<Spin::Turn>(module, "Turn").def_readonly("until", &Spin::Turn::until);
  py::class_<Spin>(module, "Spin")
      .def(py::init<SpinHost&, int64_t>(), py::keep_alive<1, 2>())
      .def("begin", &Spin::begin)
      .def("begin_until", &Spin::begin_until)
      .def("end", &Spin::end)
      .def("learn", &Spin::learn);
  py::class_<WorkSpin>(module, "WorkSpin")
      .def(py::init<SpinHost&, int64_t>(), py::keep_alive<1, 2>())
      .def("goes_on", &WorkSpin::goes_on)
      .def("goes_on_until", &WorkSpin::goes_on_until)
      .def("found", &WorkSpin::found);
  py::class_<ControlGroups>(module, "ControlGroups")
      .def(py::init([](const std::string& mounted, const std::string& self) { return ControlGroups(mounted, self); }))
      .def("quota", &ControlGroups::quota)
      .def("throttles", &ControlGroups::throttles);
}
