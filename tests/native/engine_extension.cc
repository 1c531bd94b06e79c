// The engine's Python face as a module of its own.

#include <pybind11/pybind11.h>

namespace expertd {
void bind_engine(pybind11::module_& module);
}  // namespace expertd

PYBIND11_MODULE(engine_extension, module) { expertd::bind_engine(module); }
