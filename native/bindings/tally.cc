// The Python face of what an engine tells of its requests; src/expertd/_native.pyi describes it.

#include "engine/tally.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/owned.h"
#include "bindings/unlocked.h"
#include "engine/sampler.h"

namespace py = pybind11;

namespace expertd {
namespace {

py::tuple read(const Histogram& histogram) { return py::make_tuple(histogram.counts(), histogram.sum()); }

}  // namespace

void bind_tally(py::module_& module) {
  py::class_<Told>(module, "Told")
      .def_readonly("time", &Told::time)
      .def_readonly("request_id", &Told::request_id)
      .def_readonly("layer", &Told::layer)
      .def_readonly("tokens", &Told::tokens)
      .def_readonly("pairs", &Told::pairs)
      .def_readonly("caller", &Told::caller)
      // A caller's bytes, which need not be text.
      .def_property_readonly("traceparent", [](const Told& told) { return py::bytes(told.traceparent); })
      .def_property_readonly("code", [](const Told& told) { return static_cast<int>(told.code); })
      .def_readonly("text", &Told::text)
      .def_readonly("seconds", &Told::seconds);

  const auto bytes = [](std::string Sample::* field) {
    return [field](const Sample& s) { return py::bytearray(s.*field); };
  };
  py::class_<Sample>(module, "Sample")
      .def_readonly("model_fingerprint", &Sample::model_fingerprint)
      .def_readonly("layer", &Sample::layer)
      .def_property_readonly("hidden_dtype", [](const Sample& s) { return static_cast<int>(s.hidden_dtype); })
      .def_property_readonly("sums_dtype", [](const Sample& s) { return static_cast<int>(s.sums_dtype); })
      .def_property_readonly("hidden", bytes(&Sample::hidden))
      .def_property_readonly("scales", bytes(&Sample::scales))
      .def_property_readonly("ids", bytes(&Sample::ids))
      .def_property_readonly("weights", bytes(&Sample::weights))
      .def_property_readonly("sums", bytes(&Sample::sums));

  py::class_<Sampler, std::shared_ptr<Sampler>>(module, "Sampler")
      .def(py::init<double, uint32_t>(), py::arg("rate"), py::arg("seed"))
      .def("take", &Sampler::take, py::call_guard<Unlocked>())
      .def("interrupt", &Sampler::interrupt)
      .def_property_readonly("dropped", &Sampler::dropped);

  py::class_<Histogram>(module, "Histogram")
      .def(py::init<std::vector<double>>(), py::arg("bounds"))
      .def("observe", &Histogram::observe)
      .def("read", &read);

  py::class_<Tally, std::shared_ptr<Tally>>(module, "Tally")
      .def(py::init<std::vector<uint32_t>, size_t, std::vector<double>, std::vector<double>, std::vector<double>>(),
           py::arg("layers"), py::arg("experts"), py::arg("second_bounds"), py::arg("token_bounds"),
           py::arg("fine_bounds") = std::vector<double>())
      .def("tell_of", &Tally::tell_of, py::kw_only(), py::arg("everything"), py::arg("traced"))
      .def("take_told",
           [](Tally& tally) {
             uint64_t dropped = 0;
             auto told = tally.take_told(&dropped);
             return py::make_tuple(std::move(told), dropped);
           })
      .def("answers",
           [](const Tally& tally) {
             py::list answers;
             for (const auto& answer : tally.answers()) {
               answers.append(py::make_tuple(answer.time, answer.tokens, py::tuple(py::cast(answer.seconds))));
             }
             return answers;
           })
      .def("refusals", &Tally::refusals)
      .def_property_readonly("in_flight", &Tally::in_flight)
      .def("outcomes", [](const Tally& tally, size_t code) { return tally.outcomes(code); })
      .def_property_readonly("evictions", &Tally::evictions)
      .def_property_readonly("tokens", &Tally::tokens)
      .def_property_readonly("pairs", &Tally::pairs)
      .def_property_readonly("busy_seconds", &Tally::busy_seconds)
      .def("stages",
           [](const Tally& tally) {
             py::list stages;
             for (const Histogram& stage : tally.stages()) stages.append(read(stage));
             return stages;
           })
      .def("refusal_seconds", [](const Tally& tally) { return read(tally.refusal_seconds()); })
      .def("failure_seconds", [](const Tally& tally, size_t code) { return read(tally.failure_seconds(code)); })
      .def("callers",
           [](const Tally& tally) {
             py::list callers;
             for (const auto& caller : tally.callers().named()) {
               callers.append(py::make_tuple(caller.identity, caller.tokens, caller.refusals));
             }
             return callers;
           })
      .def("other_callers",
           [](const Tally& tally) {
             const Callers::Count others = tally.callers().others();
             return py::make_tuple(others.tokens, others.refusals);
           })
      .def("batch_tokens", [](const Tally& tally) { return read(tally.batch_tokens()); })
      .def("queue_wait", &Tally::queue_wait)
      .def("expert_pairs", [](const Tally& tally) {
        const std::vector<uint64_t> pairs = tally.expert_pairs();
        return py::bytes(reinterpret_cast<const char*>(pairs.data()), pairs.size() * sizeof(uint64_t));
      });
}

}  // namespace expertd
