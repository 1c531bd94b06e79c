// The Python face of calls that go straight to lanes; src/expertd/_native.pyi describes it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/owned.h"
#include "bindings/tensor.h"
#include "bindings/unlocked.h"
#include "bindings/wait.h"
#include "call/straight_call.h"

namespace py = pybind11;

namespace expertd {
namespace {

// Ids as they travel; of 64 bits, those that do not fit become one that no expert has.
std::vector<int32_t> narrow(const int64_t* ids, size_t count) {
  constexpr int32_t kNone = std::numeric_limits<int32_t>::max();
  std::vector<int32_t> narrowed(count);
  for (size_t i = 0; i < count; ++i) {
    narrowed[i] = ids[i] == static_cast<int32_t>(ids[i]) ? static_cast<int32_t>(ids[i]) : kNone;
  }
  return narrowed;
}

// A call with the servers that it names, until it is dropped.
struct Begun {
  std::vector<std::shared_ptr<Owner>> owners;
  std::vector<py::bytes> messages, answers;  // whose memory the call uses
  std::shared_ptr<StraightCall> call;        // dropped while a thread finishes it, it lasts as long as that

  StraightCall& live() const {
    if (!call) throw std::runtime_error("the call was dropped");
    return *call;
  }
};

// As it travels.
Dtype dtype_of(py::handle dtype) {
  switch (element_of(dtype)) {
    case Element::kBFloat16:
      return Dtype::kBFloat16;
    case Element::kFloat32:
      return Dtype::kFloat32;
    case Element::kFloat8:
      return Dtype::kFloat8E4M3FN;
    default:
      throw py::value_error(py::cast<std::string>(py::str(dtype)) + " does not travel");
  }
}

Format format_of(const Tensor& tensor, const char* name) {
  switch (tensor.element) {
    case Element::kBFloat16:
      return Format::bfloat16;
    case Element::kFloat16:
      return Format::float16;
    case Element::kFloat32:
      return Format::float32;
    default:
      throw py::value_error(std::string(name) + " is neither bfloat16 nor float16 nor float32");
  }
}

Terms terms_of(const py::tuple& terms) {
  const auto timeout = terms[4].cast<std::optional<double>>();
  return {.layer = terms[0].cast<uint32_t>(),
          .hidden = dtype_of(terms[1]),
          .reply = dtype_of(terms[2]),
          .request_id = terms[3].cast<uint64_t>(),
          .timeout_us = timeout ? std::max<uint64_t>(1, static_cast<uint64_t>(*timeout * 1e6)) : 0,
          .traceparents = terms[5].cast<std::vector<std::string>>()};
}

std::unique_ptr<Begun> begin(std::vector<std::shared_ptr<Owner>> owners, py::handle hidden, py::handle ids,
                             py::handle weights, const py::tuple& terms, py::handle scales, py::handle chosen,
                             bool looped, bool in_place) {
  const Tensor states = tensor_of(hidden, "hidden");
  const size_t tokens = states.rows;
  const Tensor choices = tensor_of(ids, "ids", {.element = Element::kInt32, .other = Element::kInt64, .rows = tokens});
  const size_t top_k = choices.columns, pairs = tokens * top_k;
  const Tensor given = tensor_of(weights, "weights", {.element = Element::kFloat32, .rows = tokens, .columns = top_k});
  Routed routed{.hidden = states.matrix(),
                .format = Format::bfloat16,  // of what comes with scales: it is only copied
                .tokens = tokens,
                .width = states.columns,
                .top_k = top_k,
                .ids = {choices.values<int32_t>(), pairs},
                .weights = {given.values<float>(), pairs},
                .shares = {},
                .scales = {}};
  if (scales.is_none()) {
    routed.format = format_of(states, "hidden");
  } else if (states.element != element_of(terms[1])) {
    throw py::value_error("hidden is not of the dtype that travels, although it has scales");
  } else {
    const size_t blocks = states.columns / QUANTIZATION_BLOCK;
    routed.scales =
        tensor_of(scales, "scales", {.element = Element::kFloat32, .rows = tokens, .columns = blocks, .packed = false})
            .matrix();
  }
  if (!chosen.is_none()) {
    const Tensor owner = tensor_of(chosen, "chosen", {.element = Element::kInt64});
    routed.shares = {{owner.values<int64_t>(), owner.rows * owner.columns}, owner.columns};
  }
  Terms said = terms_of(terms);
  auto begun = std::make_unique<Begun>();
  const auto allocate = [&begun](size_t size) {
    const py::gil_scoped_acquire held;
    // Uninitialised, and nobody's yet: so long it may be written to.
    auto message = py::reinterpret_steal<py::bytes>(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size)));
    if (!message) throw py::error_already_set();
    begun->messages.push_back(message);
    return reinterpret_cast<std::byte*>(PyBytes_AS_STRING(message.ptr()));
  };
  const Unlocked unlocked;
  begun->owners = std::move(owners);
  std::vector<const Owner*> servers;
  for (const auto& server : begun->owners) servers.push_back(server.get());
  std::vector<int32_t> narrowed;
  if (choices.element == Element::kInt64) {
    narrowed = narrow(choices.values<int64_t>(), pairs);
    routed.ids = narrowed;
  }
  if (!said.traceparents.empty() && said.traceparents.size() != servers.size()) {
    throw std::invalid_argument("traceparents must be one for each owner, or none");
  }
  begun->call = StraightCall::begin(std::move(servers), routed, said, looped, in_place, allocate);
  return begun->call ? std::move(begun) : nullptr;
}

py::list slots(const Begun& begun) {
  py::list slots;
  for (const CallPart& part : begun.live().parts()) {
    if (part.lane && part.state == PartState::kPosted) slots.append(py::make_tuple(part.lane, part.slot));
  }
  return slots;
}

template <typename Value>
py::bytes bytes_of(std::span<const Value> values) {
  return {reinterpret_cast<const char*>(values.data()), values.size_bytes()};
}

py::list parts(const Begun& begun) {
  py::list parts;
  for (const CallPart& part : begun.live().parts()) {
    const bool replied = part.state == PartState::kAnswered || part.state == PartState::kRefused;
    const auto* sums = reinterpret_cast<const char*>(part.sums);
    parts.append(py::make_tuple(part.owner->number, bytes_of(begun.live().tokens_of(part)),
                                bytes_of(begun.live().ids_of(part)), bytes_of(begun.live().weights_of(part)),
                                part.state, py::bytes(part.answer.data(), part.answer.size()),
                                replied && part.lane ? py::bytes(sums, begun.live().sums_bytes(part)) : py::bytes(),
                                static_cast<double>(part.spent_ns) / 1e9, part.request_id));
  }
  return parts;
}

// (part, server, request id, ExecuteRequest) of what is to be sent.
py::list messages(const Begun& begun) {
  py::list messages;
  auto next = begun.messages.begin();
  const std::vector<CallPart>& parts = begun.live().parts();
  for (size_t index = 0; index < parts.size(); ++index) {
    if (parts[index].lane) continue;
    messages.append(py::make_tuple(index, parts[index].owner->number, parts[index].request_id, *next++));
  }
  return messages;
}

void answer(Begun& begun, size_t index, const std::optional<py::bytes>& response) {
  if (!begun.call) return;
  if (response) begun.answers.push_back(*response);
  begun.call->answer(index, response ? std::string_view(*response) : std::string_view());
}

// (server, tokens) of each part.
py::list planned(const Begun& begun) {
  py::list planned;
  for (const CallPart& part : begun.live().parts()) planned.append(py::make_tuple(part.owner->number, part.rows));
  return planned;
}

py::list report(const StraightCall& call) {
  py::list report;
  for (const CallPart& part : call.parts()) {
    uint64_t pairs = 0;
    for (const auto& entry : part.response.receipt) pairs += entry.second;
    const StageSeconds& spent = part.response.seconds;
    report.append(
        py::make_tuple(part.owner->number, part.rows, pairs, static_cast<double>(part.spent_ns) / 1e9,
                       py::make_tuple(spent.decode, spent.queue, spent.copy_in, spent.compute, spent.copy_out)));
  }
  return report;
}

Output output_of(const StraightCall& call, py::handle out) {
  const Tensor sums = tensor_of(out, "out");
  if (sums.rows != call.tokens() || sums.columns != call.width()) {
    const std::string wanted = std::to_string(call.tokens()) + ", " + std::to_string(call.width());
    throw py::value_error("out: it must be [" + wanted + "]");
  }
  return {format_of(sums, "out"), sums.writable()};
}

std::optional<py::list> finish_call(Begun& begun, std::optional<double> timeout, py::handle out) {
  begun.live();
  const std::shared_ptr<StraightCall> call = begun.call;
  const std::optional<Output> output = call->in_place() ? std::nullopt : std::optional(output_of(*call, out));
  const Wait how = wait_with_signals(timeout, [&](int64_t deadline) { return call->finish(deadline, output); });
  if (how == Wait::kForked) throw std::runtime_error("the call is its parent process's");
  return how == Wait::kDone && call->summed() ? std::optional(report(*call)) : std::nullopt;
}

}  // namespace

void bind_call(py::module_& module) {
  py::enum_<PartState>(module, "PartState")
      .value("POSTED", PartState::kPosted)
      .value("ANSWERED", PartState::kAnswered)
      .value("REFUSED", PartState::kRefused)
      .value("FULL", PartState::kFull)
      .value("ENDED", PartState::kEnded);

  py::class_<Owner, std::shared_ptr<Owner>>(module, "Owner")
      .def(py::init([](int64_t number, std::vector<std::shared_ptr<ClientLane>> lanes, std::string fingerprint,
                       std::optional<uint64_t> epoch, uint64_t chunk_tokens, uint32_t reply_room, bool checked) {
             if (chunk_tokens < 1) throw std::invalid_argument("chunk_tokens is 0; it must be at least 1");
             return std::make_shared<Owner>(
                 Owner{number, std::move(lanes), std::move(fingerprint), epoch, chunk_tokens, reply_room, checked});
           }),
           py::arg("number"), py::arg("lanes"), py::arg("fingerprint"), py::arg("epoch"), py::arg("chunk_tokens"),
           py::arg("reply_room"), py::arg("checked"))
      .def_readonly("checked", &Owner::checked);

  py::class_<Kept>(module, "KeptSums", py::buffer_protocol())
      .def("__len__", &Kept::size)
      .def_buffer([](const Kept& kept) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(kept.data()), static_cast<py::ssize_t>(kept.size()));
      });

  py::class_<Begun>(module, "StraightCall")
      .def_static("begin", &begin, py::arg("owners"), py::arg("hidden"), py::arg("ids"), py::arg("weights"),
                  py::arg("terms"), py::kw_only(), py::arg("scales") = py::none(), py::arg("chosen") = py::none(),
                  py::arg("looped") = false, py::arg("in_place") = false)
      .def_property_readonly("planned", &planned)
      .def_property_readonly("in_place", [](const Begun& begun) { return begun.live().in_place(); })
      .def("collect", [](Begun& begun) { return begun.live().collect(); })
      .def(
          "lose",
          [](Begun& begun, int64_t number) {
            if (begun.call) begun.call->lose(number);
          },
          py::arg("number"))
      .def_property_readonly("messages", &messages)
      .def("answer", &answer, py::arg("part"), py::arg("response"))
      .def("finish", &finish_call, py::arg("timeout"), py::arg("out") = py::none())
      .def("keep",
           [](Begun& begun) {
             StraightCall& call = begun.live();
             if (!call.in_place() || !call.summed()) throw std::runtime_error("there are no sums in place");
             return call.keep();
           })
      .def("drop", [](Begun& begun) { begun.call.reset(); })
      .def("slots", &slots)
      .def("parts", &parts);

  module.def(
      "response_id", [](const py::bytes& response) { return response_id(std::string_view(response)); },
      py::arg("response"));
}

}  // namespace expertd
