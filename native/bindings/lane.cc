// The Python face of a lane's caller, and of mappings; src/expertd/_native.pyi describes it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

#include "bindings/owned.h"
#include "bindings/unlocked.h"
#include "bindings/wait.h"
#include "lane/client_lane.h"

namespace py = pybind11;

namespace expertd {
namespace {

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
  switch (wait_with_signals(timeout, [&](int64_t deadline) { return lane.wait(slot, deadline); })) {
    case Wait::kForked:
      forked();
    case Wait::kUnknown:
      throw std::invalid_argument("no call is in slot " + std::to_string(slot));
    case Wait::kDone:
      return true;
    case Wait::kEnded:
      return false;
    default:
      return std::nullopt;
  }
}

std::optional<py::bytes> reply(ClientLane& lane, uint64_t slot) {
  const auto bytes = lane.reply(slot);
  return bytes ? std::optional<py::bytes>(*bytes) : std::nullopt;
}

}  // namespace

void bind_lane(py::module_& module) {
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const std::system_error& error) {
      PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), error.what()).ptr());
    }
  });

  py::class_<Mapping, std::shared_ptr<Mapping>>(module, "Mapping", py::buffer_protocol())
      // Not py::call_guard: pybind11 would note the new object among all others without the lock, too.
      .def(py::init([](int descriptor, size_t size) {
             const Unlocked unlocked;
             return std::make_shared<Mapping>(descriptor, size);
           }),
           py::arg("descriptor"), py::arg("size"))
      .def_property_readonly("broken", &Mapping::broken)
      .def("close", &Mapping::close, py::call_guard<Unlocked>())
      .def("__len__", &Mapping::size)
      .def_buffer([](Mapping& mapping) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(mapping.base()), static_cast<py::ssize_t>(mapping.size()));
      });

  py::class_<FreeList>(module, "FreeList")
      .def(py::init<uint64_t, uint64_t>(), py::arg("begin"), py::arg("end"))
      .def("take", &FreeList::take, py::arg("length"))
      .def("give_back", &FreeList::give_back, py::arg("begin"), py::arg("length"));

  py::class_<ClientLane, std::shared_ptr<ClientLane>>(module, "ClientLane")
      .def(py::init([](size_t size, uint32_t entries, std::optional<int64_t> spin_us, bool posted_by_gpu) {
             const Unlocked unlocked;
             return std::make_shared<ClientLane>(size, entries, SpinHost::here(), Spin::max_ns(spin_us),
                                                 posted_by_gpu ? kGpu : kHost);
           }),
           py::arg("size"), py::arg("entries"), py::arg("spin_us") = py::none(), py::arg("posted_by_gpu") = false)
      .def_static("data_at", &data_at, py::arg("entries"))
      .def_property_readonly("descriptor", &ClientLane::descriptor)
      .def_property_readonly("socket", &ClientLane::socket)
      .def_property_readonly("memory", &ClientLane::memory)
      .def_property_readonly("data", &ClientLane::data)
      .def_property_readonly("ended", &ClientLane::ended)
      .def_property_readonly("in_flight", &ClientLane::in_flight)
      .def_property_readonly("reason", [](const ClientLane& lane) { return py::bytes(lane.reason()); })
      .def_property_readonly("free_bytes", &ClientLane::free_bytes)
      .def("take", &ClientLane::take, py::arg("length"))
      .def(
          "give_back", [](ClientLane& lane, uint64_t at, uint64_t bytes) { lane.give_back({at, bytes}); },
          py::arg("at"), py::arg("length"))
      .def("connect", &ClientLane::connect, py::arg("socket"))
      .def("post", &post, py::arg("slot"), py::arg("request"), py::arg("reply_room"), py::arg("looped") = false)
      .def("nudge", &ClientLane::nudge)
      .def("wait", &wait, py::arg("slot"), py::arg("timeout") = py::none())
      .def("reply", &reply, py::arg("slot"))
      .def("cancel", &ClientLane::cancel, py::arg("slot"))
      .def("reap", &ClientLane::reap)
      .def("poll", &ClientLane::poll)
      .def("close", &ClientLane::close);
}

}  // namespace expertd
