#include "lane.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "refused.h"

namespace {

namespace v1 = expertd::v1;

constexpr uint32_t kInvalidArgument = 3, kDeadlineExceeded = 4, kUnavailable = 14;  // status codes
constexpr uint64_t kLine = 64;
constexpr uint64_t kTail = 64, kAsleep = 192, kLooping = 256, kRing = 4096;
constexpr uint32_t kEntries = 64;
constexpr uint64_t kEntryBytes = 16, kData = kRing + kEntries * kEntryBytes;
constexpr uint32_t kRequest = 1, kPosted = 1, kDone = 4;
constexpr uint64_t kMaxRequestBytes = 4096;
constexpr char kBell = 0, kReason = 1;
constexpr int kTimeoutMs = 60'000;

uint64_t Aligned(uint64_t at) { return (at + kLine - 1) / kLine * kLine; }

int Checked(int result, const char* what) {
  if (result < 0) throw std::system_error(errno, std::generic_category(), what);
  return result;
}

// An ExecuteResponse after its length.
bool ReadFramed(std::string_view bytes, v1::ExecuteResponse* response) {
  uint32_t length = 0;
  if (bytes.size() < sizeof length) return false;
  std::memcpy(&length, bytes.data(), sizeof length);
  bytes.remove_prefix(sizeof length);
  return bytes.size() >= length && response->ParseFromArray(bytes.data(), static_cast<int>(length));
}

// Just `count` bytes, since what follows is the lane's.
std::string Receive(int socket, size_t count) {
  std::string bytes(count, 0);
  for (size_t got = 0; got < count;) {
    const ssize_t more = Checked(recv(socket, bytes.data() + got, count - got, 0), "recv");
    if (more == 0) throw Refused(kUnavailable, "the connection was closed while memory was handed over");
    got += more;
  }
  return bytes;
}

void SendWithDescriptor(int socket, std::string bytes, int descriptor) {
  iovec data{bytes.data(), bytes.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof descriptor);
  std::memcpy(CMSG_DATA(header), &descriptor, sizeof descriptor);
  Checked(sendmsg(socket, &message, MSG_NOSIGNAL), "sendmsg");
}

void Connect(int socket, const std::string& name) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (name.size() >= sizeof address.sun_path) throw std::runtime_error("the socket's name is too long: " + name);
  std::memcpy(address.sun_path, name.data(), name.size());
  if (name.starts_with("@")) address.sun_path[0] = 0;
  const socklen_t length = offsetof(sockaddr_un, sun_path) + name.size();
  Checked(connect(socket, reinterpret_cast<const sockaddr*>(&address), length), "connect");
}

// `size` bytes of a new file.
char* Map(int file, uint64_t size) {
  Checked(ftruncate(file, static_cast<off_t>(size)), "ftruncate");
  Checked(fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK), "fcntl");
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  return static_cast<char*>(memory);
}

// The server does not see how much was written: it reads as much as the request's numbers say.
void CheckSize(const char* name, const std::string& tensor, uint64_t bytes) {
  if (tensor.size() == bytes) return;
  throw Refused(kInvalidArgument, std::string(name) + " has " + std::to_string(tensor.size()) +
                                      " bytes; the server would read " + std::to_string(bytes));
}

}  // namespace

File::~File() { close(descriptor_); }

void Lane::Unmap::operator()(char* memory) const { munmap(memory, size); }

Lane::Lane(const v1::RegisterSharedMemoryResponse& door, const v1::GetShardResponse& shard, uint64_t size)
    : shard_(shard),
      size_(size),
      reply_room_(1024 + 8 * shard.config().n_routed_experts()),
      memory_file_(Checked(memfd_create("lane", MFD_CLOEXEC | MFD_ALLOW_SEALING), "memfd_create")),
      memory_(Map(memory_file_.get(), size), Unmap{size}),
      socket_(Checked(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket")) {
  WriteHeader();
  HandOver(door);
}

std::atomic_ref<uint32_t> Lane::Word(uint64_t at) const {
  return std::atomic_ref<uint32_t>(*reinterpret_cast<uint32_t*>(memory_.get() + at));
}

void Lane::Write(uint64_t at, std::string_view bytes) { std::memcpy(memory_.get() + at, bytes.data(), bytes.size()); }

void Lane::WriteHeader() {
  const struct {
    uint64_t magic = 0x4c64747265707865;
    uint32_t version = kLaneVersion, entries = kEntries;
    uint64_t ring = kRing, data = kData;
  } header;
  std::memcpy(memory_.get(), &header, sizeof header);
}

void Lane::HandOver(const v1::RegisterSharedMemoryResponse& door) {
  Connect(socket_.get(), door.socket());
  SendWithDescriptor(socket_.get(), door.ticket(), memory_file_.get());
  uint32_t length = 0;
  const std::string prefix = Receive(socket_.get(), sizeof length);
  std::memcpy(&length, prefix.data(), sizeof length);
  v1::ExecuteResponse answer;
  if (!ReadFramed(prefix + Receive(socket_.get(), length), &answer))
    throw std::runtime_error("the answer cannot be read");
  if (answer.has_error()) throw Refused(answer.error().code(), answer.error().message());
}

std::vector<v1::ExecuteResponse> Lane::Execute(const std::vector<v1::ExecuteRequest>& requests) {
  // Each earlier call is done, so that the ring is empty.
  if (requests.size() > kEntries) throw std::runtime_error("at most " + std::to_string(kEntries) + " calls at once");
  std::vector<Call> calls;
  uint64_t at = kData;
  for (const auto& request : requests) calls.push_back(Place(request, &at));
  for (const Call& call : calls) Post(call.slot);
  for (bool open = true;; open = Listen()) {
    // Says that a bell is wanted before it looks, so that no answer comes unseen in between.
    Word(kLooping).store(1);
    if (std::all_of(calls.begin(), calls.end(), [this](const Call& call) { return Done(call); })) break;
    if (!open) Fail();
  }
  std::vector<v1::ExecuteResponse> replies;
  for (const Call& call : calls) replies.push_back(Read(call));
  return replies;
}

// Writes tensors and slot from `at` on, and moves it behind them.
Lane::Call Lane::Place(const v1::ExecuteRequest& request, uint64_t* at) {
  const uint64_t tokens = request.num_tokens(), values = tokens * shard_.config().hidden_size();
  const bool float8 = request.hidden_dtype() == v1::DTYPE_FLOAT8_E4M3FN;
  CheckSize("hidden", request.hidden(), float8 ? values : 2 * values);
  CheckSize("hidden_scales", request.hidden_scales(), float8 ? values / 128 * 4 : 0);
  CheckSize("expert_ids", request.expert_ids(), 4 * tokens * request.top_k());
  CheckSize("weights", request.weights(), 4 * tokens * request.top_k());
  const std::array tensors = {&request.hidden(), &request.hidden_scales(), &request.expert_ids(), &request.weights()};

  Call call;
  call.partials = *at;
  for (const std::string* tensor : tensors) call.partials = Aligned(call.partials + tensor->size());
  call.partials_bytes = values * (request.reply_dtype() == v1::DTYPE_FLOAT32 ? 4 : 2);
  call.slot = Aligned(call.partials + call.partials_bytes);
  v1::ExecuteRequest posted = request;
  posted.clear_hidden();
  posted.clear_hidden_scales();
  posted.clear_expert_ids();
  posted.clear_weights();
  posted.set_segment_offset(*at);
  const std::string message = posted.SerializeAsString();
  if (message.size() > kMaxRequestBytes) throw std::runtime_error("the request is too long for a lane");
  call.reply = Aligned(call.slot + kLine + message.size());
  const uint64_t end = Aligned(call.reply + reply_room_);
  if (end > size_) throw std::runtime_error("the batch needs " + std::to_string(end) + " bytes of shared memory");

  for (const std::string* tensor : tensors) {
    Write(*at, *tensor);
    *at = Aligned(*at + tensor->size());
  }
  const std::array slot = {kPosted, static_cast<uint32_t>(message.size()), static_cast<uint32_t>(reply_room_), 0u};
  std::memcpy(memory_.get() + call.slot, slot.data(), sizeof slot);
  Write(call.slot + kLine, message);
  *at = end;
  return call;
}

void Lane::Post(uint64_t slot) {
  const struct {
    uint64_t slot;
    uint32_t kind = kRequest, zero = 0;
  } entry{slot};
  std::memcpy(memory_.get() + kRing + tail_ % kEntries * kEntryBytes, &entry, sizeof entry);
  Word(kTail).store(++tail_);
  if (Word(kAsleep).load() == 1 && Word(kAsleep).exchange(0) == 1) send(socket_.get(), &kBell, 1, MSG_NOSIGNAL);
}

bool Lane::Done(const Call& call) const { return Word(call.slot).load() == kDone; }

// Waits until the server has sent something; false once it has closed the lane.
bool Lane::Listen() {
  pollfd readable{socket_.get(), POLLIN, 0};
  if (Checked(poll(&readable, 1, kTimeoutMs), "poll") == 0) throw Refused(kDeadlineExceeded, "no answer came");
  std::array<char, 4096> bytes;
  const ssize_t count = recv(socket_.get(), bytes.data(), bytes.size(), 0);
  if (count <= 0) return false;
  std::string_view news(bytes.data(), count);
  if (heard_.empty()) news.remove_prefix(std::min(news.find(kReason), news.size()));
  heard_ += news;
  return true;
}

void Lane::Fail() const {
  v1::ExecuteResponse reason;
  if (!heard_.empty() && ReadFramed(std::string_view(heard_).substr(1), &reason)) {
    throw Refused(reason.error().code(), reason.error().message());
  }
  throw Refused(kUnavailable, "the server closed the lane");
}

v1::ExecuteResponse Lane::Read(const Call& call) const {
  const uint64_t length = std::min<uint64_t>(Word(call.slot + 12).load(), reply_room_);
  v1::ExecuteResponse reply;
  if (!reply.ParseFromArray(memory_.get() + call.reply, static_cast<int>(length))) {
    throw std::runtime_error("a reply cannot be read");
  }
  if (!reply.has_error()) reply.set_partials(memory_.get() + call.partials, call.partials_bytes);
  return reply;
}
