// The Python face of inboxes: requests of an event loop, and what becomes of them.

#include "engine/inbox.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/owned.h"
#include "bindings/unlocked.h"
#include "engine/engine.h"
#include "request/reply.h"

namespace py = pybind11;

namespace expertd {
namespace {

// Above this many bytes a request is checked, and a reply written, without Python's lock.
constexpr size_t kLongBytes = 64 * 1024;
// The same of the checksum of a reply that nobody has to wait for but its caller: some 100 us.
constexpr size_t kLongAlone = 1 << 20;
// Seconds until a deadline that a clock in nanoseconds can tell from none.
constexpr double kLongest = 1e9;

std::string_view bytes_of(const py::handle& data) {
  return {PyBytes_AS_STRING(data.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(data.ptr()))};
}

// A request of an event loop. The inbox keeps it until it is over, for what it has of Python's is touched with Python's
// lock only.
class PyJob final : public Job {
 public:
  PyJob(std::shared_ptr<Inbox> inbox, py::object message, py::object context)
      : inbox(std::move(inbox)), message(std::move(message)), context(std::move(context)) {}

  bool is_slow() const override { return is_long() && !response_; }

  bool is_slow_to_complete() const override {
    return is_long() && !(alone && !request.rounds() && request.reply_bytes() <= kLongAlone);
  }

  void make_room() override {
    if (!is_long()) {
      short_.resize(begin_reply());
    } else if (!response_) {
      const py::gil_scoped_acquire locked;
      reserve();
      if (!response_) return;
    }
    char* const answer = is_long() ? PyBytes_AS_STRING(response_.ptr()) : short_.data();
    put_reply(reinterpret_cast<std::byte*>(answer + head_.size()));
  }

  // Makes room for a long answer now, with Python's lock; where there is no memory, `make_room` tries again.
  void reserve() {
    if (!is_long()) return;
    response_ =
        py::reinterpret_steal<py::object>(PyBytes_FromStringAndSize(nullptr, static_cast<py::ssize_t>(begin_reply())));
    if (!response_) PyErr_Clear();
  }

  void complete() override {
    std::memcpy(reinterpret_cast<char*>(reply) - head_.size(), head_.data(), head_.size());
    const std::string tail =
        reply_tail(request, seconds, reply_checksum(request.request_id, reply, request.reply_bytes()));
    std::memcpy(reply + request.reply_bytes(), tail.data(), tail.size());
  }

  void settle(Outcome outcome) override { inbox->push({ticket, std::move(outcome)}); }

  // The complete answer.
  py::object response() const {
    const py::object whole = short_.empty() ? response_ : py::bytes(short_.data(), short_.size());
    return appendix.empty() ? whole : whole + py::bytes(appendix);
  }

  // Gives back what is Python's; the last who knows the job may be a thread without Python's lock.
  void release() {
    inbox.reset();
    message = context = response_ = py::object();
  }

  std::shared_ptr<Inbox> inbox;
  uint64_t ticket = 0;
  py::object message;  // the bytes that the request refers to
  py::object context;  // what the caller wants back with the answer

 private:
  // A long answer is made in the bytes that Python gets, so that it is not copied once more.
  bool is_long() const { return request.reply_bytes() > kLongBytes; }
  // Writes the head; the length of all, which is the same whatever the numbers will be.
  size_t begin_reply() {
    head_ = reply_head(request, request.reply_bytes());
    return head_.size() + request.reply_bytes() + reply_tail(request, {}, 0).size();
  }

  std::string head_;
  std::vector<char> short_;
  py::object response_;
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

class PyInbox : public Owned {
 public:
  PyInbox() : inbox_(std::make_shared<Inbox>()) {}

  int fileno() const { return inbox_->fd(); }
  size_t size() const { return inbox_->size(); }

  Submitted submit(Engine& engine, const py::bytes& data, std::string caller, py::object context,
                   std::optional<double> time_remaining, std::string_view traceparent, std::string identity) {
    auto job = std::make_shared<PyJob>(inbox_, data, std::move(context));
    job->arrived_ns = monotonic_ns();
    job->identity = std::move(identity);
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
        submitted.traceparent = (message->traceparent.empty() ? traceparent : message->traceparent).substr(0, 64);
        submitted.refusal = engine.check(*message, job.get());
      } else {
        submitted.refusal = std::get<Refusal>(std::move(parsed));
      }
    }
    if (submitted.cancels) return submitted;
    if (submitted.refusal) return turned_away(engine, std::move(submitted), caller, *job);
    if (time_remaining) {
      job->expires_ns = job->arrived_ns + static_cast<uint64_t>(std::clamp(*time_remaining, 0.0, kLongest) * 1e9);
    }
    job->caller = std::move(caller);
    job->traceparent = submitted.traceparent;
    // Who waits for nobody else has its room while this thread has Python's lock.
    if (inbox_->size() == 0) job->reserve();
    job->ticket = inbox_->open(job);
    submitted.refusal = engine.submit(job);
    if (submitted.refusal) {
      inbox_->close(job->ticket);
      job->release();
      return turned_away(engine, std::move(submitted), job->caller, *job);
    }
    submitted.ticket = job->ticket;
    return submitted;
  }

  static Submitted turned_away(Engine& engine, Submitted submitted, const std::string& caller, const Job& job) {
    engine.tally().turned_away(*submitted.refusal, submitted.request_id, submitted.layer, caller, job.identity,
                               submitted.traceparent, job.arrived_ns);
    return submitted;
  }

  void cancel(Engine& engine, uint64_t ticket) {
    if (auto job = inbox_->find(ticket)) engine.cancel(std::move(job));
  }

  std::vector<Answered> drain() {
    std::vector<Answered> answers;
    for (Inbox::Answer& answer : inbox_->drain()) {
      auto job = std::static_pointer_cast<PyJob>(inbox_->find(answer.ticket));
      auto& [refusal, told, over] = answer.outcome;
      if (told) {
        py::object response = refusal ? py::none() : job->response();
        answers.push_back({job, std::move(refusal), std::move(response), job->context});
      }
      if (!over) continue;
      job->release();
      inbox_->close(answer.ticket);
    }
    return answers;
  }

 private:
  const std::shared_ptr<Inbox> inbox_;
};

}  // namespace

void bind_inbox(py::module_& module) {
  py::class_<Submitted>(module, "Submitted")
      .def_readonly("request_id", &Submitted::request_id)
      .def_readonly("cancels", &Submitted::cancels)
      .def_readonly("ticket", &Submitted::ticket)
      .def_readonly("refusal", &Submitted::refusal);

  py::class_<Answered>(module, "Answered")
      .def_readonly("context", &Answered::context)
      .def_readonly("refusal", &Answered::refusal)
      .def_readonly("response", &Answered::response)
      .def_property_readonly("request_id", [](const Answered& a) { return a.job->request.request_id; });

  py::class_<PyInbox>(module, "Inbox")
      .def(py::init<>())
      .def("fileno", &PyInbox::fileno)
      .def("__len__", &PyInbox::size)
      .def(
          "submit",
          [](PyInbox& inbox, Engine& engine, const py::bytes& data, std::string caller, py::object context,
             std::optional<double> time_remaining, std::string_view traceparent, std::string identity) {
            return inbox.submit(engine, data, std::move(caller), std::move(context), time_remaining, traceparent,
                                std::move(identity));
          },
          py::arg("engine"), py::arg("message"), py::arg("caller"), py::arg("context"), py::arg("time_remaining"),
          py::arg("traceparent"), py::arg("identity") = "")
      .def("cancel", [](PyInbox& inbox, Engine& engine, uint64_t ticket) { inbox.cancel(engine, ticket); })
      .def("drain", &PyInbox::drain);
}

}  // namespace expertd
