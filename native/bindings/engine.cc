// The engine's Python face; src/expertd/_native.pyi describes it.

#include "engine/engine.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "base/crc32c.h"
#include "engine/callback_executor.h"
#include "request/reply.h"

namespace py = pybind11;

namespace expertd {
namespace {

// Above this many bytes a request is checked, and a reply written, without Python's lock.
constexpr size_t kLongBytes = 64 * 1024;

// Takes the lock away while `long_enough`.
class Unlocked {
 public:
  explicit Unlocked(bool long_enough) {
    if (long_enough) release_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> release_;
};

std::string_view bytes_of(const py::handle& data) {
  return {PyBytes_AS_STRING(data.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(data.ptr()))};
}

// What Python holds for a job: the bytes that its request refers to, and whatever the caller wants back with the
// answer. Touched with Python's lock only.
struct Held {
  py::object message;
  py::object context;
};

// A job with what Python holds for it. The inbox keeps it until the job is over.
struct PyJob : Job {
  Held held;
  std::string traceparent;
};

// The outcome of handing in one message of a caller.
struct Submitted {
  uint64_t request_id = 0;
  uint64_t layer = 0;
  std::optional<uint64_t> cancels;
  std::optional<uint64_t> ticket;
  std::optional<Refusal> refusal;
  std::string traceparent;
};

// One answer, as the inbox hands it out.
struct Answered {
  std::shared_ptr<PyJob> job;
  std::optional<Refusal> refusal;
  py::object response;  // bytes, or None beside a refusal
  py::object context;
};

py::memoryview view(std::string_view bytes) {
  return py::memoryview::from_memory(bytes.data(), static_cast<py::ssize_t>(bytes.size()));
}

class PyInbox {
 public:
  PyInbox() : inbox_(std::make_shared<Inbox>()) {}

  int fileno() const { return inbox_->fd(); }
  size_t size() const { return inbox_->size(); }

  Submitted submit(Engine& engine, const py::bytes& data, std::string caller, py::object context,
                   std::optional<double> time_remaining, const std::string& traceparent) {
    auto job = std::make_shared<PyJob>();
    job->arrived_ns = monotonic_ns();
    const std::string_view bytes = bytes_of(data);
    Submitted submitted;
    std::variant<Message, Refusal> parsed;
    {
      const Unlocked unlocked(bytes.size() > kLongBytes);
      parsed = parse_message(bytes);
      if (const auto* message = std::get_if<Message>(&parsed)) {
        submitted.request_id = message->request_id;
        submitted.layer = message->layer;
        submitted.cancels = message->cancels;
        submitted.traceparent =
            message->traceparent.empty() ? traceparent : std::string(message->traceparent.substr(0, 64));
        submitted.refusal = engine.check(*message, job.get());
      } else {
        submitted.refusal = std::get<Refusal>(std::move(parsed));
      }
    }
    if (submitted.refusal || submitted.cancels) return submitted;
    if (time_remaining) {
      job->expires_ns = job->arrived_ns + static_cast<uint64_t>(std::max(*time_remaining, 0.0) * 1e9);
    }
    job->caller = std::move(caller);
    job->traceparent = submitted.traceparent;
    job->held = {data, std::move(context)};
    job->inbox = inbox_;
    job->ticket = inbox_->open(job);
    submitted.refusal = engine.submit(job);
    if (submitted.refusal) {
      inbox_->close(job->ticket);
      job->held = {};
    } else {
      submitted.ticket = job->ticket;
    }
    return submitted;
  }

  void cancel(Engine& engine, uint64_t ticket) {
    if (auto job = inbox_->find(ticket)) engine.cancel(std::move(job));
  }

  std::vector<Answered> drain() {
    std::vector<Answered> answers;
    for (Inbox::Answer& answer : inbox_->drain()) {
      auto job = std::static_pointer_cast<PyJob>(inbox_->find(answer.ticket));
      auto response = py::reinterpret_steal<py::object>(static_cast<PyObject*>(std::exchange(job->reply, nullptr)));
      if (answer.told) {
        if (answer.refusal) response = py::none();
        answers.push_back({job, std::move(answer.refusal), std::move(response), job->held.context});
      }
      if (!answer.over) continue;
      // Now: the last who knows the job may be a thread without Python's lock.
      job->held = {};
      job->inbox.reset();
      inbox_->close(answer.ticket);
    }
    return answers;
  }

 private:
  const std::shared_ptr<Inbox> inbox_;
};

// A batch in the hands of a Python thread.
class PyBatch {
 public:
  PyBatch(std::unique_ptr<Batch> batch, CallbackExecutor* executor) : batch_(std::move(batch)), executor_(executor) {}
  ~PyBatch() {
    if (batch_) fail("the batch was dropped");
  }
  PyBatch(PyBatch&&) = default;

  const Batch& batch() const {
    if (!batch_) throw py::value_error("the batch was given back");
    return *batch_;
  }

  // (hidden, scales or None, local ids, weights, tokens) of every request: views of memory that is lent until the batch
  // is given back.
  py::list requests() const {
    py::list requests;
    for (const auto& job : batch().jobs) {
      const Admitted& request = job->request;
      const std::string_view ids(reinterpret_cast<const char*>(request.local_ids.data()), 4 * request.local_ids.size());
      requests.append(py::make_tuple(view(request.hidden),
                                     request.scales.empty() ? py::object(py::none()) : view(request.scales), view(ids),
                                     view(request.weights), request.tokens));
    }
    return requests;
  }

  // Takes the sums of every request, contiguous, and the pairs that the device counted, and gives the batch back.
  void finish(const std::vector<py::buffer>& sums, const std::vector<uint32_t>& pairs, double copy_in, double compute,
              double copy_out) {
    Batch& batch = *batch_;
    if (auto wrong = miscounted(batch, pairs)) return fail(std::move(*wrong));
    std::vector<py::buffer_info> infos;
    std::vector<char*> replies;
    std::vector<std::string> heads, tails;
    size_t longest = 0;
    const uint64_t now = monotonic_ns();
    for (size_t i = 0; i < batch.jobs.size(); ++i) {
      Job& job = *batch.jobs[i];
      infos.push_back(sums.at(i).request());
      const auto bytes = static_cast<size_t>(infos.back().size * infos.back().itemsize);
      if (bytes != job.request.reply_bytes()) {
        throw py::value_error("sums of request " + std::to_string(i) + " have " + std::to_string(bytes) + " bytes; " +
                              std::to_string(job.request.reply_bytes()) + " are expected");
      }
      job.seconds = {.decode = seconds_between(job.arrived_ns, job.admitted_ns),
                     .queue = seconds_between(job.admitted_ns, now) - copy_in - compute - copy_out,
                     .copy_in = copy_in,
                     .compute = compute,
                     .copy_out = copy_out};
      heads.push_back(reply_head(job.request, bytes));
      // The checksum is put in its place, the last four bytes, when the sums are there.
      tails.push_back(reply_tail(job.request, job.seconds, 0));
      job.reply =
          PyBytes_FromStringAndSize(nullptr, static_cast<py::ssize_t>(heads[i].size() + bytes + tails[i].size()));
      if (job.reply == nullptr) throw py::error_already_set();
      replies.push_back(PyBytes_AS_STRING(static_cast<PyObject*>(job.reply)));
      longest = std::max(longest, bytes);
    }
    {
      const Unlocked unlocked(longest > kLongBytes);
      for (size_t i = 0; i < batch.jobs.size(); ++i) {
        const auto bytes = batch.jobs[i]->request.reply_bytes();
        char* out = replies[i];
        std::memcpy(out, heads[i].data(), heads[i].size());
        std::memcpy(out + heads[i].size(), infos[i].ptr, bytes);
        char* tail = out + heads[i].size() + bytes;
        std::memcpy(tail, tails[i].data(), tails[i].size());
        const uint32_t sum = checksum(batch.jobs[i]->request.request_id, out + heads[i].size(), bytes);
        for (int k = 0; k < 4; ++k) tail[tails[i].size() - 4 + k] = static_cast<char>(sum >> 8 * k & 0xFF);
      }
    }
    batch.compute_seconds = compute;
    executor_->give_back(std::move(batch_));
  }

  void fail(std::string text) {
    batch_->failure = Refusal{Code::kInternal, std::move(text)};
    executor_->give_back(std::move(batch_));
  }

 private:
  static double seconds_between(uint64_t begin, uint64_t end) { return static_cast<double>(end - begin) * 1e-9; }

  static uint32_t checksum(uint64_t request_id, const char* sums, size_t bytes) {
    std::byte id[8];
    for (int i = 0; i < 8; ++i) id[i] = static_cast<std::byte>(request_id >> 8 * i & 0xFF);
    return crc32c(crc32c(0, id, sizeof id), reinterpret_cast<const std::byte*>(sums), bytes);
  }

  // What is wrong with the pairs that the device counted.
  static std::optional<std::string> miscounted(const Batch& batch, const std::vector<uint32_t>& pairs) {
    std::vector<uint32_t> expected(pairs.size());
    for (const auto& job : batch.jobs) {
      for (size_t expert = 0; expert < expected.size(); ++expert) expected[expert] += job->request.pairs.at(expert);
    }
    if (expected == pairs) return std::nullopt;
    const auto list = [](const std::vector<uint32_t>& values) {
      std::string text;
      for (const uint32_t value : values) text += (text.empty() ? "[" : ", ") + std::to_string(value);
      return text + "]";
    };
    return "layer " + std::to_string(batch.first().layer) + ": the device computed pairs " + list(pairs) + ", not " +
           list(expected);
  }

  std::unique_ptr<Batch> batch_;
  CallbackExecutor* executor_;
};

// The engine whose batches Python threads compute.
struct PyEngine {
  CallbackExecutor* executor;  // the engine's
  std::unique_ptr<Engine> engine;
};

std::unique_ptr<PyEngine> make_engine(PlacementPtr placement, uint64_t batch_tokens, uint64_t queued_tokens,
                                      uint64_t queued_bytes, size_t depth) {
  auto executor = std::make_unique<CallbackExecutor>(depth);
  auto made = std::make_unique<PyEngine>();
  made->executor = executor.get();
  made->engine = std::make_unique<Engine>(std::move(placement), Bounds{batch_tokens, queued_tokens, queued_bytes},
                                          std::move(executor));
  made->executor->on_done([engine = made->engine.get()] { engine->wake(); });
  return made;
}

}  // namespace

void bind_engine(py::module_& module) {
  py::class_<Refusal>(module, "Refusal")
      .def_property_readonly("code", [](const Refusal& refusal) { return static_cast<int>(refusal.code); })
      .def_readonly("text", &Refusal::text)
      .def_readonly("retry_after", &Refusal::retry_after)
      .def("response",
           [](const Refusal& refusal, uint64_t request_id) { return py::bytes(reply_refusal(request_id, refusal)); });

  py::class_<Placement, std::shared_ptr<Placement>>(module, "Placement")
      .def(py::init([](std::string fingerprint, uint64_t epoch, std::vector<uint32_t> layers, std::string layers_text,
                       std::vector<uint32_t> experts, std::string experts_text, uint32_t num_routed_experts,
                       uint32_t hidden_size, uint32_t max_top_k, uint32_t max_tokens) {
             Placement placement{.model_fingerprint = std::move(fingerprint),
                                 .epoch = epoch,
                                 .layers = std::move(layers),
                                 .layers_text = std::move(layers_text),
                                 .experts = std::move(experts),
                                 .experts_text = std::move(experts_text),
                                 .local_ids = {},
                                 .hidden_size = hidden_size,
                                 .max_top_k = max_top_k,
                                 .max_tokens = max_tokens};
             return std::const_pointer_cast<Placement>(make_placement(std::move(placement), num_routed_experts));
           }),
           py::kw_only(), py::arg("model_fingerprint"), py::arg("epoch"), py::arg("layers"), py::arg("layers_text"),
           py::arg("experts"), py::arg("experts_text"), py::arg("num_routed_experts"), py::arg("hidden_size"),
           py::arg("max_top_k"), py::arg("max_tokens"))
      .def_readonly("epoch", &Placement::epoch);

  py::class_<Submitted>(module, "Submitted")
      .def_readonly("request_id", &Submitted::request_id)
      .def_readonly("layer", &Submitted::layer)
      .def_readonly("cancels", &Submitted::cancels)
      .def_readonly("ticket", &Submitted::ticket)
      .def_readonly("refusal", &Submitted::refusal)
      .def_readonly("traceparent", &Submitted::traceparent);

  py::class_<Answered>(module, "Answered")
      .def_readonly("context", &Answered::context)
      .def_readonly("refusal", &Answered::refusal)
      .def_readonly("response", &Answered::response)
      .def_property_readonly("request_id", [](const Answered& a) { return a.job->request.request_id; })
      .def_property_readonly("layer", [](const Answered& a) { return a.job->request.layer; })
      .def_property_readonly("tokens", [](const Answered& a) { return a.job->request.tokens; })
      .def_property_readonly("caller", [](const Answered& a) { return a.job->caller; })
      .def_property_readonly("traceparent", [](const Answered& a) { return a.job->traceparent; })
      .def_property_readonly("pairs", [](const Answered& a) { return a.job->request.pairs; })
      .def_property_readonly("seconds",
                             [](const Answered& a) {
                               const StageSeconds& s = a.job->seconds;
                               return py::make_tuple(s.decode, s.queue, s.copy_in, s.compute, s.copy_out);
                             })
      .def_property_readonly("arrived_ns", [](const Answered& a) { return a.job->arrived_ns; });

  py::class_<PyInbox>(module, "Inbox")
      .def(py::init<>())
      .def("fileno", &PyInbox::fileno)
      .def("__len__", &PyInbox::size)
      .def("submit",
           [](PyInbox& inbox, PyEngine& engine, const py::bytes& data, std::string caller, py::object context,
              std::optional<double> time_remaining, const std::string& traceparent) {
             return inbox.submit(*engine.engine, data, std::move(caller), std::move(context), time_remaining,
                                 traceparent);
           })
      .def("cancel", [](PyInbox& inbox, PyEngine& engine, uint64_t ticket) { inbox.cancel(*engine.engine, ticket); })
      .def("drain", &PyInbox::drain);

  py::class_<PyBatch>(module, "Batch")
      .def_property_readonly("layer", [](const PyBatch& b) { return b.batch().first().layer; })
      .def_property_readonly("top_k", [](const PyBatch& b) { return b.batch().first().top_k; })
      .def_property_readonly("hidden_dtype",
                             [](const PyBatch& b) { return static_cast<int>(b.batch().first().hidden_dtype); })
      .def_property_readonly("reply_dtype",
                             [](const PyBatch& b) { return static_cast<int>(b.batch().first().reply_dtype); })
      .def_property_readonly("tokens", [](const PyBatch& b) { return b.batch().tokens; })
      .def_property_readonly("alone", [](const PyBatch& b) { return b.batch().alone; })
      .def("requests", &PyBatch::requests)
      .def("finish", &PyBatch::finish)
      .def("fail", &PyBatch::fail);

  py::class_<PyEngine>(module, "Engine")
      .def(py::init([](std::shared_ptr<Placement> placement, uint64_t batch_tokens, uint64_t queued_tokens,
                       uint64_t queued_bytes, size_t depth) {
             return make_engine(std::move(placement), batch_tokens, queued_tokens, queued_bytes, depth);
           }),
           py::arg("placement"), py::kw_only(), py::arg("max_batch_tokens"), py::arg("max_queued_tokens"),
           py::arg("max_queued_bytes"), py::arg("depth"))
      .def("start", [](PyEngine& e) { e.engine->start(); })
      .def("stop",
           [](PyEngine& e) {
             const py::gil_scoped_release unlocked;
             e.engine->stop();
           })
      .def("turn", [](PyEngine& e, uint64_t now) { return e.engine->turn(now); })
      .def("open", [](PyEngine& e) { e.engine->open(); })
      .def(
          "close", [](PyEngine& e, std::string reason, bool refusing) { e.engine->close(std::move(reason), refusing); },
          py::arg("reason"), py::kw_only(), py::arg("refusing") = true)
      .def("abandon", [](PyEngine& e, std::string reason) { e.engine->abandon(std::move(reason)); })
      .def_property_readonly("closed_because", [](const PyEngine& e) { return e.engine->closed_because(); })
      .def_property_readonly("queued_tokens", [](const PyEngine& e) { return e.engine->queued_tokens(); })
      .def_property_readonly("queued_bytes", [](const PyEngine& e) { return e.engine->queued_bytes(); })
      .def_property(
          "placement", [](const PyEngine& e) { return std::const_pointer_cast<Placement>(e.engine->placement()); },
          [](PyEngine& e, std::shared_ptr<Placement> placement) { e.engine->set_placement(std::move(placement)); })
      .def("fetch",
           [](PyEngine& e) -> std::optional<PyBatch> {
             std::unique_ptr<Batch> batch;
             {
               const py::gil_scoped_release unlocked;
               batch = e.executor->fetch();
             }
             if (!batch) return std::nullopt;
             return PyBatch(std::move(batch), e.executor);
           })
      .def("interrupt", [](PyEngine& e) { e.executor->interrupt(); });
}

}  // namespace expertd
