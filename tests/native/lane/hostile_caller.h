// A caller that writes whatever it likes into all that it shares with a server.
#pragma once

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <random>
#include <string>
#include <utility>

#include "ends.h"
#include "request/wire.h"

namespace expertd::testing {

using Random = std::mt19937_64;

inline constexpr size_t kSize = 1 << 18;
inline constexpr uint64_t kData = 8192, kCallSpace = 4096, kCalls = 48;
inline constexpr uint32_t kEntryCount = 64, kWidth = 128, kExperts = 4, kTopK = 2, kMaxTokens = 8,
                          kRoom = 1024 + 8 * kExperts;
// One in so many: what ends a lane.
inline constexpr uint64_t kRare = 1024;

// Where the tensors of a call are, from its beginning on, as native/request/segment.cc lays them out.
struct Places {
  explicit Places(uint32_t tokens)
      : scales(next_line(tokens * kWidth)),
        ids(next_line(scales + tokens * 4)),
        weights(next_line(ids + tokens * kTopK * 4)),
        sums(next_line(weights + tokens * kTopK * 4)),
        end(next_line(sums + tokens * kWidth * 2)) {}
  uint64_t scales, ids, weights, sums, end;
};

inline std::string request(uint64_t number, uint32_t tokens, uint64_t offset) {
  std::string out;
  put_number(&out, 1, number);
  put_bytes(&out, 2, "model");
  for (const auto& [field, value] : std::initializer_list<std::pair<int, uint64_t>>{
           {3, 1}, {4, 1 + number % 2}, {5, tokens}, {6, kTopK}, {7, 1}, {8, 2}, {13, 20'000'000}, {14, offset}}) {
    put_number(&out, field, value);
  }
  return out;
}

inline uint64_t nasty(Random& random) {
  constexpr uint64_t kEdges[] = {
      0,     1,          2,          3,          4,          63,   64,         4095,      4096,      4097, kSize - 64,
      kSize, kSize + 64, 0x7fffffff, 0x80000000, 0xffffffff, ~0ul, ~0ul - 63u, 1ul << 63, 1ul << 32, 8192, 8256};
  return random() % 3 ? kEdges[random() % std::size(kEdges)] : random() % 2 ? random() % kSize / 64 * 64 : random();
}

// One of what a caller may spoil in a request.
inline std::string mutated(std::string message, Random& random) {
  switch (random() % 6) {
    case 0:
      for (uint64_t i = random() % 4 + 1; i > 0; i--) message[random() % message.size()] = static_cast<char>(random());
      break;
    case 1:
      message.resize(random() % message.size());
      break;
    case 2:  // the last of several counts
      put_number(&message, static_cast<int>(random() % 18), nasty(random));
      break;
    case 3:
      put_bytes(&message, static_cast<int>(1 + random() % 17),
                std::string(random() % 200, static_cast<char>(random())));
      break;
    case 4:
      put_varint(&message, nasty(random));
      break;
    default:
      for (uint64_t i = random() % 100; i > 0; i--) put_number(&message, static_cast<int>(random() % 40 + 1), 1);
  }
  return message.substr(0, 900);
}

// Its own mapping of the same memory, as another process would have; written by words, as memory is torn.
class Hostile {
 public:
  Hostile(int memfd, int socket, uint64_t seed)
      : memfd_(memfd), socket_(socket), memory_(memfd, kSize), words_(memory_.base()), random_(seed) {}

  void run(const std::atomic<bool>& stop) {
    while (!stop) step();
    close(socket_);
  }

 private:
  void step() {
    const uint64_t call = kData + random_() % kCalls * kCallSpace;
    // Mostly almost good, so that lanes live long enough to be harmed.
    switch (random_() % 64) {
      case 0:
        if (random_() % kRare == 0) put(kTail);
        break;
      case 1:
        words_.word(random_() % 2 ? kAsleep : kLooping).store(static_cast<uint32_t>(random_() % 3));
        break;
      case 2:
        put(call + (random_() % 64 ? 0 : 4 * (random_() % 4)));
        break;
      case 3:
        words_.wide((random_() % 64 ? kData : 0) + random_() % ((kSize - kData) / 8) * 8).store(nasty(random_));
        break;
      case 4:
        words_.word(kRing + random_() % kEntryCount * kEntryBytes + 8)
            .store(static_cast<uint32_t>(random_() % kRare ? 1 + random_() % 2 : nasty(random_)));
        break;
      case 5:
        (void)!send(socket_, "\0\1\2", 1 + random_() % 3, MSG_DONTWAIT | MSG_NOSIGNAL);
        break;
      case 6:
        if (random_() % 8 == 0) lose();
        break;
      case 7:  // tensors, while they may be read
        for (int i = 0; i < 32; i++) put(call + 2048 + 4 * (random_() % 512));
        break;
      default:
        post(call);
    }
  }

  void put(uint64_t at) { words_.word(at).store(static_cast<uint32_t>(nasty(random_)), std::memory_order_relaxed); }

  // Memory, or the connection.
  void lose() {
    switch (random_() % 128) {
      case 0:
        (void)!ftruncate(memfd_, static_cast<off_t>(random_() % kSize));
        break;
      case 1:
        shutdown(socket_, random_() % 2 ? SHUT_RDWR : SHUT_WR);
        break;
      case 2:
        // The number is another file's at once: nothing that somebody else opens may get it while this writes there.
        (void)!dup3(memfd_, socket_, O_CLOEXEC);
        break;
      default:
        (void)!fallocate(memfd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                         static_cast<off_t>((random_() % 64 ? kData : 0) + random_() % kCalls * 4096), 4096);
    }
  }

  // A call that is good, or good but for one thing.
  void post(uint64_t call) {
    const uint32_t tail = words_.word(kTail).load();
    const bool full = tail - words_.word(kHead).load() >= kEntryCount;
    // Posted again before its answer, it ends the lane: that, like all that does, is to be rare.
    if (full || (words_.word(call).load() == kPosted && random_() % kRare)) {
      usleep(20);
      return;
    }
    const auto tokens = static_cast<uint32_t>(1 + random_() % 4);
    const Places places(tokens);
    for (uint32_t i = 0; i < tokens * kTopK; i++) {
      const uint32_t id = random_() % 32 ? (i + tail) % kExperts : static_cast<uint32_t>(nasty(random_));
      words_.word(call + 2048 + places.ids + 4 * i).store(id, std::memory_order_relaxed);
    }
    std::string message = request(tail + 1, tokens, call + 2048);
    if (random_() % 4 == 0) message = mutated(std::move(message), random_);
    for (size_t at = 0; at < message.size(); at += 8) {
      uint64_t value = 0;
      std::memcpy(&value, message.data() + at, std::min<size_t>(8, message.size() - at));
      words_.wide(request_at(call) + at).store(value, std::memory_order_relaxed);
    }
    const bool good = random_() % kRare != 0;
    prepare(words_, call, good ? static_cast<uint32_t>(message.size()) : static_cast<uint32_t>(nasty(random_)),
            random_() % kRare ? kRoom : static_cast<uint32_t>(nasty(random_)));
    if (push(words_, kEntryCount, tail,
             {random_() % kRare ? call : nasty(random_), random_() % 8 ? kRequest : kCancel})) {
      (void)!send(socket_, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
  }

  const int memfd_, socket_;
  Mapping memory_;
  Words words_;
  Random random_;
};

// A lane's memory that its owner may also take away, with a head that is mostly right.
inline int hostile_memory(Random& random) {
  const int memfd = memfd_create("hostile", MFD_CLOEXEC);
  require(memfd >= 0 && ftruncate(memfd, kSize) == 0, "memfd");
  const Mapping memory(memfd, kSize);
  const Words words(memory.base());
  words.wide(0).store(kLaneMagic);
  words.word(kVersion).store(kLaneVersion);
  words.word(kEntries).store(kEntryCount);
  words.wide(kRingAt).store(kRing);
  words.wide(kDataAt).store(kData);
  if (random() % 8 == 0) words.wide(random() % 4 * 8).store(nasty(random));
  return memfd;
}

}  // namespace expertd::testing
