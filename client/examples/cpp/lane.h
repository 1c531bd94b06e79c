// The caller's end of THE LANE, written from expert_shard.proto alone.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "expert_shard.pb.h"

// Of the lane that is spoken here.
inline constexpr uint32_t kLaneVersion = 3;

// Closes its file at the end.
class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int get() const { return descriptor_; }

 private:
  const int descriptor_;
};

// Calls whose tensors lie in memory that is shared with a server on this machine. For one thread.
class Lane {
 public:
  // Hands `size` bytes over at the server's door. Throws Refused if the server does not take them.
  Lane(const expertd::v1::RegisterSharedMemoryResponse& door, const expertd::v1::GetShardResponse& shard,
       uint64_t size);

  // Posts all requests, and waits for all answers, which are in the same order and may be errors. Tensors are in the
  // messages, as over gRPC. Throws Refused if the lane ends before.
  std::vector<expertd::v1::ExecuteResponse> Execute(const std::vector<expertd::v1::ExecuteRequest>& requests);

 private:
  // Where a call's parts lie in the memory.
  struct Call {
    uint64_t slot = 0;
    uint64_t reply = 0;
    uint64_t partials = 0;
    uint64_t partials_bytes = 0;
  };

  struct Unmap {
    uint64_t size;
    void operator()(char* memory) const;
  };

  std::atomic_ref<uint32_t> Word(uint64_t at) const;
  void WriteHeader();
  void HandOver(const expertd::v1::RegisterSharedMemoryResponse& door);
  Call Place(const expertd::v1::ExecuteRequest& request, uint64_t* at);
  void Write(uint64_t at, std::string_view bytes);
  void Post(uint64_t slot);
  bool Done(const Call& call) const;
  bool Listen();
  [[noreturn]] void Fail() const;
  expertd::v1::ExecuteResponse Read(const Call& call) const;

  const expertd::v1::GetShardResponse& shard_;
  const uint64_t size_;
  const uint64_t reply_room_;
  const File memory_file_;
  const std::unique_ptr<char, Unmap> memory_;
  const File socket_;
  uint32_t tail_ = 0;
  std::string heard_;  // on the socket, but for bells
};
