#include "lane/connection.h"

#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>

#include "lane/ring.h"

namespace expertd {
namespace {

constexpr size_t kMaxReasonBytes = 8 * 1024;
constexpr size_t kHeaderBytes = 1 + sizeof(uint32_t);

}  // namespace

void Connection::ring() const { (void)!send(descriptor(), &kBell, 1, MSG_DONTWAIT | MSG_NOSIGNAL); }

void Connection::shut_down() const { shutdown(descriptor(), SHUT_RDWR); }

void Connection::send_reason(std::string_view message) const {
  const auto length = static_cast<uint32_t>(message.size());
  std::string bytes(kHeaderBytes, kReason);
  std::memcpy(bytes.data() + 1, &length, sizeof length);
  bytes += message;
  // Whoever has left no room for it does not read.
  (void)!send(descriptor(), bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
  shut_down();
}

bool Connection::drain() {
  if (ended_) return false;
  // Once: whoever sends without end costs a bounded time, and what is left wakes its reader again.
  std::array<char, 4096> bytes;
  const ssize_t count = recv(descriptor(), bytes.data(), bytes.size(), MSG_DONTWAIT);
  if (count > 0) take({bytes.data(), static_cast<size_t>(count)});
  ended_ = count == 0 || (count < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
  return !ended_;
}

void Connection::take(std::string_view bytes) {
  if (reason_.empty()) bytes.remove_prefix(std::min(bytes.find(kReason), bytes.size()));
  if (reason_.size() + bytes.size() <= kMaxReasonBytes) reason_ += bytes;
}

std::string_view Connection::reason() const {
  uint32_t length = 0;
  if (reason_.size() < kHeaderBytes) return {};
  std::memcpy(&length, reason_.data() + 1, sizeof length);
  return reason_.size() - kHeaderBytes == length ? std::string_view(reason_).substr(kHeaderBytes) : std::string_view();
}

}  // namespace expertd
