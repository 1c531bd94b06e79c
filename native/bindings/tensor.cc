#include "bindings/tensor.h"

#include <pybind11/gil_safe_call_once.h>

#include <algorithm>
#include <array>
#include <string>

namespace py = pybind11;

namespace expertd {
namespace {

constexpr size_t kElements = static_cast<size_t>(Element::kOther);
constexpr std::array<const char*, kElements> kNames = {"bfloat16",      "float16", "float32",
                                                       "float8_e4m3fn", "int32",   "int64"};
constexpr std::array<ptrdiff_t, kElements + 1> kBytes = {2, 2, 4, 1, 4, 8, 0};

using Dtypes = std::array<PyObject*, kElements>;

const Dtypes& dtypes() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Dtypes> known;
  return known
      .call_once_and_store_result([] {
        const py::module_ torch = py::module_::import("torch");
        Dtypes found{};
        for (size_t i = 0; i < kElements; ++i) found[i] = py::object(torch.attr(kNames[i])).release().ptr();
        return found;
      })
      .get_stored();
}

// What is asked of a tensor; strings are looked up faster once they are interned.
struct Questions {
  PyObject* const shape = PyUnicode_InternFromString("shape");
  PyObject* const stride = PyUnicode_InternFromString("stride");
  PyObject* const dtype = PyUnicode_InternFromString("dtype");
  PyObject* const is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
};

const Questions& questions() {
  static const Questions once;
  return once;
}

py::object checked(PyObject* answer) {
  if (!answer) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer);
}

py::object attribute(py::handle of, PyObject* name) { return checked(PyObject_GetAttr(of.ptr(), name)); }
py::object call(py::handle of, PyObject* name) { return checked(PyObject_CallMethodNoArgs(of.ptr(), name)); }

ptrdiff_t number(py::handle numbers, Py_ssize_t index) {
  return PyLong_AsSsize_t(PyTuple_GET_ITEM(numbers.ptr(), index));
}

[[noreturn]] void refuse(py::handle tensor, std::string_view name, const std::string& wanted) {
  const auto text = [](const py::object& value) { return py::cast<std::string>(py::str(value)); };
  throw py::value_error(std::string(name) + ": " + text(tensor.attr("dtype")) + " " +
                        text(py::list(tensor.attr("shape"))) + ", strides " + text(call(tensor, questions().stride)) +
                        ", on " + text(tensor.attr("device")) + "; it must be " + wanted + " on the CPU");
}

}  // namespace

Element element_of(py::handle dtype) {
  const Dtypes& known = dtypes();
  return static_cast<Element>(std::find(known.begin(), known.end(), dtype.ptr()) - known.begin());
}

Tensor tensor_of(py::handle tensor, std::string_view name) {
  const Questions& ask = questions();
  const py::object shape = attribute(tensor, ask.shape), stride = call(tensor, ask.stride);
  const bool whole = PyTuple_GET_SIZE(shape.ptr()) == 2 && (number(stride, 1) == 1 || number(shape, 1) <= 1);
  if (!whole || attribute(tensor, ask.is_cpu).ptr() != Py_True) refuse(tensor, name, "a matrix of whole rows");
  const Element element = element_of(attribute(tensor, ask.dtype));
  return {reinterpret_cast<std::byte*>(PyLong_AsSize_t(call(tensor, ask.data_ptr).ptr())),  // NOLINT
          number(stride, 0) * kBytes[static_cast<size_t>(element)], static_cast<size_t>(number(shape, 0)),
          static_cast<size_t>(number(shape, 1)), element};
}

Tensor tensor_of(py::handle tensor, std::string_view name, const Wanted& wanted) {
  const Tensor found = tensor_of(tensor, name);
  const auto row = static_cast<ptrdiff_t>(found.columns) * kBytes[static_cast<size_t>(found.element)];
  const auto is = [](size_t size, size_t its) { return its == kAny || size == its; };
  const bool apart = wanted.packed && found.rows > 1 && found.stride != row;
  if ((found.element == wanted.element || found.element == wanted.other) && is(found.rows, wanted.rows) &&
      is(found.columns, wanted.columns) && !apart)
    return found;
  const auto text = [](size_t size) { return size == kAny ? std::string("any") : std::to_string(size); };
  refuse(tensor, name,
         std::string(wanted.packed ? "contiguous " : "") + kNames[static_cast<size_t>(wanted.element)] + " [" +
             text(wanted.rows) + ", " + text(wanted.columns) + "]");
}

}  // namespace expertd
