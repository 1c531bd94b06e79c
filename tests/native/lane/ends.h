#pragma once

#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "echo_server.h"
#include "lane/client_lane.h"
#include "lane/futex.h"

namespace expertd::testing {

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::printf("failed: %s\n", what);
  std::fflush(stdout);
  std::_Exit(1);
}

constexpr uint32_t kUp = 7456, kDown = 14336;  // one token's bytes
constexpr size_t kSlotBytes = 64 + 64 + 1024, kCallBytes = kSlotBytes + next_line(kUp + kDown);

// Where call `index` of a lane is: its slot, then its tensors.
inline uint64_t slot_of(const ClientLane& lane, uint32_t index) { return next_line(lane.data()) + index * kCallBytes; }

inline std::array<int, 2> socket_pair() {
  std::array<int, 2> ends;
  require(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) == 0, "socketpair");
  return ends;
}

inline Post post(ClientLane& lane, uint32_t index, bool looped = false, uint32_t held = 0, uint32_t up = kUp,
                 uint32_t down = kDown) {
  const uint64_t slot = slot_of(lane, index);
  const Echo echo{.at = slot + kSlotBytes, .up = up, .down = down, .held = held};
  std::memset(lane.memory()->base() + echo.at, static_cast<int>(index & 0xff), up);
  return lane.post(slot, echo.bytes(), 1024, looped);
}

inline void check_reply(ClientLane& lane, uint32_t index, uint32_t up = kUp, uint32_t down = kDown) {
  const uint64_t slot = slot_of(lane, index);
  const auto reply = lane.reply(slot);
  require(reply && reply->size() == sizeof(Echo), "a reply has the length of an echo");
  require(Echo::from(*reply).sum == up * (index & 0xff), "the server read what was written");
  const std::byte* out = lane.memory()->base() + slot + kSlotBytes + up;
  for (uint32_t i = 0; i < down; i++) require(out[i] == std::byte{'d'}, "the server's bytes are there");
}

inline int64_t in_ms(int64_t ms) { return monotonic_ns() + ms * 1'000'000; }

// A lane whose other end is in this process as well, on the same mapping.
inline std::unique_ptr<ClientLane> join(EchoServer& server, size_t size, uint32_t entries) {
  auto lane = std::make_unique<ClientLane>(size, entries);
  const auto [here, there] = socket_pair();
  lane->connect(here);
  std::string reason;
  require(server.add(lane->memory(), there, &reason), reason.c_str());
  return lane;
}

// A message of one byte, with room for a descriptor. It refers to itself: it stays where it is.
struct Parcel {
  char byte = 0;
  iovec data{&byte, 1};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{.msg_name = nullptr,
                 .msg_namelen = 0,
                 .msg_iov = &data,
                 .msg_iovlen = 1,
                 .msg_control = control.data(),
                 .msg_controllen = control.size(),
                 .msg_flags = 0};
};

// Descriptors go to other processes over `socket`.
inline void send_descriptor(int socket, int descriptor) {
  Parcel parcel;
  cmsghdr* header = CMSG_FIRSTHDR(&parcel.message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &descriptor, sizeof descriptor);
  require(sendmsg(socket, &parcel.message, 0) == 1, "sendmsg");
}

inline int receive_descriptor(int socket) {
  Parcel parcel;
  require(recvmsg(socket, &parcel.message, MSG_CMSG_CLOEXEC) == 1 && CMSG_FIRSTHDR(&parcel.message), "recvmsg");
  int descriptor = -1;
  std::memcpy(&descriptor, CMSG_DATA(CMSG_FIRSTHDR(&parcel.message)), sizeof descriptor);
  return descriptor;
}

}  // namespace expertd::testing
