// The engine's Python face; src/expertd/_native.pyi describes it.

#include "engine/engine.h"

#include <fcntl.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <unordered_set>
#include <utility>
#include <vector>

#include "bindings/owned.h"
#include "bindings/unlocked.h"

namespace py = pybind11;

namespace expertd {
namespace {

uint64_t add_lane(Engine& engine, std::shared_ptr<Mapping> memory, int socket, std::string caller, std::string identity,
                  bool pinned, uintptr_t gpu_address, uint64_t gpu_bytes, bool of_peer) {
  const int own = fcntl(socket, F_DUPFD_CLOEXEC, 0);
  if (own < 0) throw std::system_error(errno, std::generic_category(), "socket");
  auto lane = std::make_shared<Lane>();
  std::string reason;
  lane->ring = ServerLane::attach(memory, own, engine.min_reply_room(), &reason);
  if (!lane->ring) {
    close(own);
    throw py::value_error(reason);
  }
  lane->segment = {.base = memory->base(),
                   .size = memory->size(),
                   .data = lane->ring->data(),
                   .gpu = reinterpret_cast<std::byte*>(gpu_address),
                   .gpu_size = gpu_bytes};
  lane->reach = pinned ? Reach::kPinned : Reach::kPageable;
  lane->gpu_reach = of_peer ? Reach::kPeer : Reach::kDevice;
  lane->identity = std::move(identity);
  lane->caller = std::move(caller);
  return engine.lanes().add(std::move(lane));
}

// Those whom the engine waits for may wait for Python's lock, which its jobs need in the end.
bool stop(Engine& engine) {
  const Unlocked unlocked;
  return engine.stop();
}

// All that there are. With Python's lock.
std::unordered_set<Engine*>& engines() {
  static auto* all = new std::unordered_set<Engine*>;
  return *all;
}

// What has not come to an end goes on without an owner, and so does what a child made by fork has of its parent.
struct StopThenDelete {
  void operator()(Engine* engine) const {
    engines().erase(engine);
    if (!engine->here()) return engine->lanes().close();
    if (stop(*engine)) delete engine;
  }
};

// Before the interpreter goes, whose lock its jobs may wait for.
void stop_all() {
  for (Engine* engine : std::vector(engines().begin(), engines().end())) {
    if (!engine->here()) continue;
    engine->close("the process is ending; use another replica", /*refusing=*/true);
    stop(*engine);
  }
}

}  // namespace

void bind_engine(py::module_& module) {
  py::class_<Refusal>(module, "Refusal")
      .def_property_readonly("code", [](const Refusal& refusal) { return static_cast<int>(refusal.code); })
      .def_readonly("text", &Refusal::text)
      .def_readonly("retry_after", &Refusal::retry_after);

  py::class_<OwnedLayer>(module, "OwnedLayer")
      .def(py::init([](uint32_t layer, std::vector<uint32_t> experts, std::string experts_text, uint64_t key,
                       std::array<uint64_t, 4> weights, std::vector<OwnedLayer> devices) {
             return OwnedLayer{layer, std::move(experts), std::move(experts_text), key, weights, std::move(devices)};
           }),
           py::arg("layer"), py::arg("experts"), py::kw_only(), py::arg("experts_text"), py::arg("key"),
           py::arg("weights") = std::array<uint64_t, 4>(), py::arg("devices") = std::vector<OwnedLayer>());

  py::class_<Placement, std::shared_ptr<Placement>>(module, "Placement")
      .def(py::init([](std::string fingerprint, uint64_t epoch, std::vector<OwnedLayer> layers, std::string layers_text,
                       uint32_t num_routed_experts, uint32_t hidden_size, uint32_t max_top_k, uint32_t max_tokens,
                       std::shared_ptr<Placement> beside) {
             Placement placement{.model_fingerprint = std::move(fingerprint),
                                 .epoch = epoch,
                                 .layers = std::move(layers),
                                 .layers_text = std::move(layers_text),
                                 .num_routed_experts = num_routed_experts,
                                 .hidden_size = hidden_size,
                                 .max_top_k = max_top_k,
                                 .max_tokens = max_tokens,
                                 .beside = std::move(beside)};
             return std::const_pointer_cast<Placement>(make_placement(std::move(placement)));
           }),
           py::kw_only(), py::arg("model_fingerprint"), py::arg("epoch"), py::arg("layers"), py::arg("layers_text"),
           py::arg("num_routed_experts"), py::arg("hidden_size"), py::arg("max_top_k"), py::arg("max_tokens"),
           py::arg("beside") = std::shared_ptr<Placement>())
      .def_readonly("epoch", &Placement::epoch);

  py::class_<Engine, std::unique_ptr<Engine, StopThenDelete>>(module, "Engine")
      .def(py::init([](std::shared_ptr<Placement> placement, uint64_t batch_tokens, uint64_t queued_tokens,
                       uint64_t queued_bytes, std::shared_ptr<Tally> tally, std::optional<int64_t> spin_us) {
             auto* engine = new Engine(std::move(placement), batch_tokens, {queued_tokens, queued_bytes},
                                       std::move(tally), Spin::max_ns(spin_us));
             engines().insert(engine);
             return std::unique_ptr<Engine, StopThenDelete>(engine);
           }),
           py::arg("placement"), py::kw_only(), py::arg("max_batch_tokens"), py::arg("max_queued_tokens"),
           py::arg("max_queued_bytes"), py::arg("tally").none(false), py::arg("spin_us") = py::none())
      .def("add_lane", &add_lane, py::arg("mapping"), py::arg("socket"), py::arg("caller"), py::kw_only(),
           py::arg("identity") = "", py::arg("pinned") = false, py::arg("gpu_address") = 0, py::arg("gpu_bytes") = 0,
           py::arg("of_peer") = false)
      .def_property_readonly("min_reply_room", &Engine::min_reply_room)
      .def("lanes_fileno", [](Engine& e) { return e.lanes().over_fd(); })
      .def("take_ended_lanes", [](Engine& e) { return e.lanes().take_over(); })
      .def("drain_lanes",
           [](Engine& e) {
             e.lanes().drain();
             e.wake();
           })
      .def("disconnect_lanes", [](Engine& e) { e.lanes().disconnect(); })
      .def("sample", &Engine::sample, py::arg("sampler"))
      .def("use_failpoints", &Engine::use_failpoints, py::arg("failpoints"))
      .def("use", &Engine::use, py::arg("executor"))
      .def("start", [](Engine& e) { e.start(); })
      .def("stop", &stop)
      .def("turn", [](Engine& e, uint64_t now) { return e.turn(now); })
      .def("open", [](Engine& e) { e.open(); })
      .def(
          "close", [](Engine& e, std::string reason, bool refusing) { e.close(std::move(reason), refusing); },
          py::arg("reason"), py::kw_only(), py::arg("refusing") = true)
      .def("abandon", [](Engine& e, std::string reason) { e.abandon(std::move(reason)); })
      .def("fault_fileno", [](const Engine& e) { return e.fault_fd(); })
      .def("take_fault", [](Engine& e) { return e.take_fault(); })
      .def("await_turn",
           [](Engine& e) {
             const Unlocked unlocked;
             e.await_turn();
           })
      .def_property_readonly("closed_because", [](const Engine& e) { return e.closed_because(); })
      .def_property_readonly("queued_tokens", [](const Engine& e) { return e.waiting().tokens; })
      .def(
          "check_room",
          [](const Engine& e, uint64_t tokens, uint64_t bytes, const std::string& identity) {
            return e.check_room(identity, {tokens, bytes});
          },
          py::arg("tokens"), py::arg("num_bytes"), py::arg("identity") = "")
      .def_property_readonly("handed_out", [](const Engine& e) { return e.handed_out(); })
      .def_property_readonly("queued_bytes", [](const Engine& e) { return e.waiting().bytes; })
      .def_property(
          "placement", [](const Engine& e) { return std::const_pointer_cast<Placement>(e.placement()); },
          [](Engine& e, std::shared_ptr<Placement> placement) { e.set_placement(std::move(placement)); })
      .def("uses_before", [](const Engine& e, uint64_t epoch) { return e.uses_before(epoch); });

  py::module_::import("atexit").attr("register")(py::cpp_function(&stop_all));
}

}  // namespace expertd
