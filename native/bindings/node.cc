// The Python face of a node's devices as one executor.

#include "engine/node.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "bindings/owned.h"

namespace py = pybind11;

namespace expertd {

void bind_node(py::module_& module) {
  py::class_<Adder, std::shared_ptr<Adder>>(module, "Adder");
  py::class_<NodeExecutor, Executor, std::shared_ptr<NodeExecutor>>(module, "NodeExecutor")
      .def(py::init<std::vector<std::shared_ptr<Executor>>, std::shared_ptr<Failpoints>, std::shared_ptr<Adder>>(),
           py::arg("devices"), py::arg("failpoints") = std::shared_ptr<Failpoints>(),
           py::arg("adder") = std::shared_ptr<Adder>())
      .def("lose", &NodeExecutor::lose, py::arg("device"), py::kw_only(), py::arg("hangs"))
      .def("check", &NodeExecutor::check, py::arg("device"))
      .def_property_readonly("adds_on_devices", &NodeExecutor::adds_on_devices)
      .def_property_readonly("adding_seconds", &NodeExecutor::adding_seconds)
      .def("records", [](const NodeExecutor& node) {
        py::list records;
        for (const auto& its : node.records())
          records.append(py::make_tuple(its.batches, its.failures, its.copy_in, its.compute, its.copy_out));
        return records;
      });
}

}  // namespace expertd
