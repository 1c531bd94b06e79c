// The CUDA executor's Python face, for whoever captures graphs.
#pragma once

#include <pybind11/pybind11.h>

namespace expertd::cuda {

// What Python captures graphs for; expertd.kernels.cutile.run.capture says how.
void bind_cuda(pybind11::module_& module);

}  // namespace expertd::cuda
