// The Python face of failpoints; src/expertd/_native.pyi describes it.

#include "engine/failpoints.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/owned.h"

namespace py = pybind11;

namespace expertd {

void bind_failpoints(py::module_& module) {
  py::class_<Failpoints, std::shared_ptr<Failpoints>>(module, "Failpoints")
      .def(py::init<std::string>(), py::arg("seed"))
      .def("add", &Failpoints::add, py::arg("kind"), py::arg("probability"), py::arg("seconds"))
      .def("strikes", &Failpoints::strikes)
      .def("seconds", &Failpoints::seconds)
      .def("fileno", &Failpoints::fd)
      .def("take_strikes", [](Failpoints& failpoints) {
        py::list taken;
        for (const auto& strike : failpoints.take_strikes()) taken.append(py::make_tuple(strike.kind, strike.caller));
        return taken;
      });
}

}  // namespace expertd
