// The CUDA executor's Python face: its layout, its bays' addresses, and the graphs that Python captured.

#include "bindings/cuda.h"

#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cuda/executor.h"

namespace py = pybind11;

namespace expertd::cuda {

namespace {

// Where a bay has the parts of a batch, on the device.
std::map<std::string, DevicePointer> places(const CudaExecutor& executor, size_t index, const Layout& layout) {
  const Bay& bay = executor.bay(index);
  Addresses at = bay.addresses(layout, {});
  return {{"ids", at[0]},    {"weights", at[1]}, {"hidden", at[2]},
          {"scales", at[3]}, {"sums", at[4]},    {"pairs", bay.outward() + layout.pairs()}};
}

}  // namespace

void bind_cuda(py::module_& module) {
  py::register_exception<DeviceError>(module, "DeviceError", PyExc_RuntimeError);
  py::class_<CudaExecutor>(module, "CudaExecutor")
      .def_property_readonly("depth", &CudaExecutor::depth)
      .def_property_readonly("classes", [](const CudaExecutor& executor) { return executor.options().classes; })
      .def_property_readonly("max_top_k",
                             [](const CudaExecutor& executor) { return executor.options().shape.max_top_k; })
      .def(
          "places",
          [](const CudaExecutor& executor, size_t bay, uint32_t tokens, uint8_t hidden, uint8_t reply) {
            return places(executor, bay, executor.layout(tokens, hidden, reply));
          },
          py::arg("bay"), py::arg("tokens"), py::arg("hidden_dtype"), py::arg("reply_dtype"))
      .def(
          "add_graph",
          [](CudaExecutor& executor, size_t bay, uint32_t tokens, uint8_t hidden, uint8_t reply, uintptr_t graph,
             const std::array<std::pair<DevicePointer, size_t>, 4>& layer) {
            std::array<Range, 4> ranges;
            for (size_t i = 0; i < ranges.size(); i++) ranges[i] = {layer[i].first, layer[i].second};
            executor.add_graph(bay, executor.layout(tokens, hidden, reply), reinterpret_cast<void*>(graph), ranges);
          },
          py::arg("bay"), py::arg("tokens"), py::arg("hidden_dtype"), py::arg("reply_dtype"), py::arg("graph"),
          py::arg("layer"));
}

}  // namespace expertd::cuda
