#include "lane/fault.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <mutex>
#include <stdexcept>

namespace expertd {

struct FaultGuard::Range {
  std::atomic<uintptr_t> base{0};  // 0: free
  std::atomic<size_t> size{0};
  std::atomic<bool> broken{false};
};

// What a signal handler can reach: fixed memory, without locks.
struct FaultTable {
  static constexpr size_t kMaxRanges = 1024;
  std::array<FaultGuard::Range, kMaxRanges> ranges;
  struct sigaction previous{};
  uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  std::once_flag installed;
  std::mutex adding;

  static FaultTable& get() {
    static FaultTable table;
    return table;
  }

  // Async-signal-safe: atomics and one mmap.
  bool repair(uintptr_t address) {
    for (auto& range : ranges) {
      const uintptr_t base = range.base.load(std::memory_order_acquire);
      if (base == 0 || address < base || address - base >= range.size.load(std::memory_order_relaxed)) continue;
      range.broken.store(true, std::memory_order_seq_cst);
      void* at = reinterpret_cast<void*>(address / page * page);
      return mmap(at, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at;
    }
    return false;
  }

  static void handle(int signal, siginfo_t* info, void* context) {
    FaultTable& table = get();
    if (table.repair(reinterpret_cast<uintptr_t>(info->si_addr))) return;
    if (table.previous.sa_flags & SA_SIGINFO) {
      table.previous.sa_sigaction(signal, info, context);
    } else if (table.previous.sa_handler == SIG_DFL || table.previous.sa_handler == SIG_IGN) {
      // The access is repeated on return and then does what it would have done without us.
      sigaction(SIGBUS, &table.previous, nullptr);
    } else {
      table.previous.sa_handler(signal);
    }
  }

  void install() {
    struct sigaction action{};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &previous);
  }
};

FaultGuard::FaultGuard(std::byte* base, size_t size) : range_(nullptr) {
  FaultTable& table = FaultTable::get();
  std::call_once(table.installed, [&table] { table.install(); });
  const std::lock_guard lock(table.adding);
  for (auto& range : table.ranges) {
    if (range.base.load(std::memory_order_relaxed) != 0) continue;
    range.size.store(size, std::memory_order_relaxed);
    range.broken.store(false, std::memory_order_relaxed);
    range.base.store(reinterpret_cast<uintptr_t>(base), std::memory_order_release);
    range_ = &range;
    return;
  }
  throw std::runtime_error("too many mappings are guarded against faults");
}

FaultGuard::~FaultGuard() { range_->base.store(0, std::memory_order_release); }

bool FaultGuard::broken() const { return range_->broken.load(std::memory_order_relaxed); }

}  // namespace expertd
