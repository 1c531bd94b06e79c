// The Python face of the native core; expertd/_native.pyi is its document.
//
// Memory comes as addresses, which expertd.kernels.numerics.tokens gives once it has checked what must be there.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "base/cpus.h"
#include "base/crc32c.h"
#include "base/instructions.h"
#include "base/pool.h"
#include "base/room.h"
#ifdef EXPERTD_SERVER
#include "bindings/cuda.h"
#endif
#include "bindings/place.h"
#include "bindings/unlocked.h"
#include "tokens/copy.h"
#include "tokens/gather.h"
#include "tokens/mxfp4.h"
#include "tokens/quantize.h"
#include "tokens/split.h"
#include "tokens/sum.h"

namespace py = pybind11;

namespace expertd {

void bind_batch(py::module_& module);
void bind_node(py::module_& module);
void bind_engine(py::module_& module);
void bind_inbox(py::module_& module);
void bind_failpoints(py::module_& module);
void bind_tally(py::module_& module);
void bind_lane(py::module_& module);
void bind_call(py::module_& module);

namespace {

// Work in bytes from which on other Python threads may run meanwhile; giving the lock up and asking for it again costs
// less than a microsecond, but beside a busy thread it may take 5 ms to come back.
constexpr std::size_t LONG_BYTES = 64 << 10;

template <typename Work>
auto unlocked(std::size_t bytes, const Work& work) {
  if (bytes < LONG_BYTES) return work();
  const Unlocked unlocked;
  return work();
}

std::uint32_t checksum(const py::buffer& data, std::uint32_t before) {
  Py_buffer view;
  if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE)) throw py::error_already_set();
  const auto size = static_cast<std::size_t>(view.len);
  const std::uint32_t crc =
      unlocked(size, [&] { return crc32c(before, static_cast<const std::byte*>(view.buf), size); });
  PyBuffer_Release(&view);
  return crc;
}

bool quantize_at(const Place& hidden, int format, std::size_t tokens, std::size_t width, const Place& out,
                 const Place& scales) {
  if (width % QUANTIZATION_BLOCK) throw std::invalid_argument("the width must be a multiple of 128");
  return unlocked(tokens * width, [&] {
    return quantize(rows(hidden), static_cast<Format>(format), tokens, width, writable(out), writable(scales));
  });
}

std::pair<std::size_t, bool> convert_mxfp4_at(const Place& packed, const Place& exponents, std::size_t count,
                                              std::size_t columns, const Place& out, const Place& scales) {
  if (count % QUANTIZATION_BLOCK || columns % QUANTIZATION_BLOCK)
    throw std::invalid_argument("rows and columns must be multiples of 128");
  const auto [inexact, any] = unlocked(count * columns, [&] {
    return convert_mxfp4(rows(packed), rows(exponents), count, columns, writable(out), writable(scales));
  });
  return {inexact, any};
}

void gather_at(const Place& source, std::size_t count, std::size_t row_bytes, Address indices, std::size_t wanted,
               const Place& out) {
  unlocked(wanted * row_bytes,
           [&] { gather(rows(source), count, row_bytes, values<std::int64_t>(indices, wanted), writable(out)); });
}

void copy_at(Address from, std::size_t bytes, Address to) {
  unlocked(bytes, [&] { copy(at<const std::byte>(from), bytes, at<std::byte>(to)); });
}

py::tuple split_at(Address ids, Address weights, std::size_t tokens, std::size_t top_k, Address owner,
                   std::size_t experts, std::size_t shares, const std::array<Address, 3>& out) {
  std::vector<std::int32_t> orphans;
  const Choice choice{values<std::int32_t>(ids, tokens * top_k), values<float>(weights, tokens * top_k), top_k};
  const Parts parts{at<std::int64_t>(out[0]), at<std::int32_t>(out[1]), at<float>(out[2])};
  const Shares owners{values<std::int64_t>(owner, shares * experts), experts};
  const auto counts = unlocked(tokens * top_k * 8, [&] { return split(choice, owners, parts, orphans); });
  return py::make_tuple(counts, orphans);
}

py::dict count_pairs_at(Address ids, std::size_t count) {
  const auto pairs = count_pairs(values<std::int32_t>(ids, count));
  py::dict found;
  for (std::size_t expert = 0; expert < pairs.size(); ++expert)
    if (pairs[expert]) found[py::int_(expert)] = pairs[expert];
  return found;
}

using PartAt = std::tuple<Place, int, std::size_t, Address, Address, Place>;

void sum_at(const std::vector<PartAt>& listed, std::size_t count, std::size_t width, int format, const Place& out) {
  std::vector<Part> parts;
  std::size_t bytes = 0;
  for (const auto& [sums, stored, size, indices, weights, scales] : listed) {
    const auto kind = static_cast<Format>(stored);
    if (kind == Format::float8 && width % QUANTIZATION_BLOCK)
      throw std::invalid_argument("the width must be a multiple of 128");
    parts.push_back({rows(sums), kind, size, at<const std::int64_t>(indices), at<const float>(weights), rows(scales)});
    bytes += size * width * size_of(kind);
  }
  unlocked(bytes, [&] { sum(parts, count, width, static_cast<Format>(format), writable(out)); });
}

}  // namespace
}  // namespace expertd

PYBIND11_MODULE(_native, module) {
  using namespace expertd;
  module.attr("BFLOAT16") = static_cast<int>(Format::bfloat16);
  module.attr("FLOAT16") = static_cast<int>(Format::float16);
  module.attr("FLOAT32") = static_cast<int>(Format::float32);
  module.attr("FLOAT8") = static_cast<int>(Format::float8);
  module.def("instruction_set", [] { return std::string(name(instructions())); });
  module.def("use_instruction_set", [](const std::string& wanted) { return use(wanted); });
  module.def("pool_size", [] { return Pool::of_process().size(); });
  module.def("limit_spin", [](std::int64_t us) { Pool::of_process().limit_spin(us * 1000); }, py::arg("us"));
  py::class_<Room>(module, "Room", py::buffer_protocol())
      .def(py::init<size_t>(), py::arg("size"))
      .def("__len__", &Room::size)
      .def_buffer([](Room& room) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(room.data()), static_cast<py::ssize_t>(room.size()));
      });
  module.def("usable_cpus", &usable_cpus);
  module.def("crc32c", &checksum, py::arg("data"), py::arg("value") = 0);
  module.def("quantize", &quantize_at);
  module.def("convert_mxfp4", &convert_mxfp4_at);
  module.def("copy", &copy_at);
  module.def("gather", &gather_at);
  module.def("split", &split_at);
  module.def("count_pairs", &count_pairs_at);
  module.def("sum_parts", &sum_at);
#ifdef EXPERTD_SERVER
  bind_lane(module);
  bind_call(module);
  bind_tally(module);
  bind_failpoints(module);
  bind_engine(module);
  bind_inbox(module);
  bind_batch(module);
  bind_node(module);
  cuda::bind_cuda(module);
#endif
}
