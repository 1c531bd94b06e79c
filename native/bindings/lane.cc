// The Python face of a lane's caller, and of mappings; src/expertd/_native.pyi describes it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

#include "lane/client_lane.h"
#include "lane/futex.h"

namespace py = pybind11;

namespace expertd {
namespace {

// Signals can come before the sleep that they were to end, and to other threads: so long they may go unseen.
constexpr int64_t kSignalNs = 100'000'000;

[[noreturn]] void forked() { throw std::runtime_error("the lane is its parent process's"); }

bool post(ClientLane& lane, uint64_t slot, std::string_view request, uint32_t reply_room, bool looped) {
  switch (lane.post(slot, request, reply_room, looped)) {
    case Post::kPosted:
      return true;
    case Post::kFull:
      return false;
    case Post::kMisplaced:
      throw std::invalid_argument("no call can be in slot " + std::to_string(slot));
    case Post::kEnded:
      PyErr_SetString(PyExc_ConnectionError, "the lane has ended");
      throw py::error_already_set();
    case Post::kForked:
      break;
  }
  forked();
}

// True when the call is done, false once the lane has ended without it, None at the deadline.
std::optional<bool> wait(ClientLane& lane, uint64_t slot, std::optional<double> timeout) {
  const int64_t begin = monotonic_ns();
  const int64_t deadline = timeout ? begin + static_cast<int64_t>(*timeout * 1e9) : INT64_MAX;
  for (;;) {
    Wait how;
    {
      const py::gil_scoped_release released;
      how = lane.wait(slot, std::min(deadline, monotonic_ns() + kSignalNs));
    }
    if (how == Wait::kForked) forked();
    if (how == Wait::kUnknown) throw std::invalid_argument("no call is in slot " + std::to_string(slot));
    if (how == Wait::kDone || how == Wait::kEnded) return how == Wait::kDone;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (monotonic_ns() >= deadline) return std::nullopt;
  }
}

std::optional<py::bytes> reply(ClientLane& lane, uint64_t slot) {
  const auto bytes = lane.reply(slot);
  return bytes ? std::optional<py::bytes>(*bytes) : std::nullopt;
}

}  // namespace

void bind_lane(py::module_& module) {
  py::class_<Mapping, std::shared_ptr<Mapping>>(module, "Mapping", py::buffer_protocol())
      .def(py::init<int, size_t>(), py::arg("descriptor"), py::arg("size"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("broken", &Mapping::broken)
      .def("__len__", &Mapping::size)
      .def_buffer([](Mapping& mapping) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(mapping.base()), static_cast<py::ssize_t>(mapping.size()));
      });

  py::class_<ClientLane>(module, "ClientLane")
      .def(py::init([](size_t size, uint32_t entries, int64_t spin_us) {
             return std::make_unique<ClientLane>(size, entries, SpinHost::here(), spin_us * 1000);
           }),
           py::arg("size"), py::arg("entries"), py::arg("spin_us") = Spin::kAutoNs / 1000,
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("descriptor", &ClientLane::descriptor)
      .def_property_readonly("socket", &ClientLane::socket)
      .def_property_readonly("memory", &ClientLane::memory)
      .def_property_readonly("data", &ClientLane::data)
      .def_property_readonly("ended", &ClientLane::ended)
      .def_property_readonly("in_flight", &ClientLane::in_flight)
      .def_property_readonly("reason", [](const ClientLane& lane) { return py::bytes(lane.reason()); })
      .def("connect", &ClientLane::connect, py::arg("socket"))
      .def("post", &post, py::arg("slot"), py::arg("request"), py::arg("reply_room"), py::arg("looped") = false)
      .def("wait", &wait, py::arg("slot"), py::arg("timeout") = py::none())
      .def("reply", &reply, py::arg("slot"))
      .def("cancel", &ClientLane::cancel, py::arg("slot"))
      .def("reap", &ClientLane::reap)
      .def("poll", &ClientLane::poll)
      .def("close", &ClientLane::close);
}

}  // namespace expertd
