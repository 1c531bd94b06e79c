// Every interleaving of the two ends of a ring (native/lane/ring.h) on a model
// of memory: stores wait in buffers and become visible in any order that C++
// allows for their memory orders, and a process may be killed at every step.
//
// usage: explorer SCENARIO [weaken N]     "weaken N" demotes the memory order
// at site N; prints "violation: ..." or a count
//
// A thread is a function whose only inputs are what its operations return. Its
// state is the list of those results: it is run anew from them to find its next
// operation. So a state of the whole is comparable, and each is looked at once.
// Loads are not reordered with earlier ones: what depends on acquire alone is
// ThreadSanitizer's to find.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "lane/ring.h"

namespace {

using expertd::Entry;
using expertd::Wait;
using std::memory_order;

enum Kind { kLoad, kStore, kExchange, kCompare, kFutexWait, kFutexWake, kSendBell, kAwaitBell, kClose, kReturn };
const char* const kNames[] = {"load",       "store", "exchange",   "compare", "futex wait",
                              "futex wake", "bell",  "await bell", "close",   "return"};

struct Op {
  Kind kind = kReturn;
  int at = 0;  // of a word; for bells and ends, the process that they go to
  uint64_t value = 0, expected = 0;
  memory_order order = memory_order::seq_cst;
};

struct Violation {
  std::string text;
};

void check(bool holds, const char* text) {
  if (!holds) throw Violation{text};
}

constexpr uint64_t kEnded = 1;  // an address that the layout leaves free: a word of the caller's own
constexpr int kServer = 0, kCaller = 1;

// Addresses become small numbers.
int number_of(uint64_t at) {
  static std::map<uint64_t, int> numbers;
  return numbers.try_emplace(at, static_cast<int>(numbers.size())).first->second;
}

// The thread that runs now: results that are known, and the operation whose
// result is not.
struct Running {
  const std::vector<uint64_t>* results = nullptr;
  size_t next = 0;
  Op pending;
};
Running running;
struct Unknown {};

uint64_t perform(const Op& op) {
  if (running.next < running.results->size()) return (*running.results)[running.next++];
  running.pending = op;
  throw Unknown{};
}

template <class Value>
struct Cell {
  int at;
  Value load(memory_order order) const { return static_cast<Value>(perform({kLoad, at, 0, 0, order})); }
  void store(Value value, memory_order order) const { perform({kStore, at, value, 0, order}); }
  Value exchange(Value value, memory_order order) const {
    return static_cast<Value>(perform({kExchange, at, value, 0, order}));
  }
  bool compare_exchange_strong(Value& expected, Value value, memory_order order) const {
    const uint64_t before = perform({kCompare, at, value, expected, order});
    const bool changed = before == expected;
    expected = static_cast<Value>(before);
    return changed;
  }
};

struct Model {
  Cell<uint32_t> word(uint64_t at) const { return {number_of(at)}; }
  Cell<uint64_t> wide(uint64_t at) const { return {number_of(at)}; }
};

bool futex_wait(uint64_t slot) { return perform({kFutexWait, number_of(slot), 0, expertd::kSleeping}); }
void futex_wake(uint64_t slot) { perform({kFutexWake, number_of(slot)}); }
void send_bell(int process) { perform({kSendBell, process}); }
bool await_bell(int process) { return perform({kAwaitBell, process}); }  // false: the other end has gone
void close_connection() { perform({kClose}); }

// ---- both ends, as server_lane.cc and client_lane.cc use the templates

constexpr uint32_t kCalls = 2;
uint64_t slot_of(uint32_t call) { return 8192 + 128 * call; }
uint64_t request_of(uint32_t call) { return 100 + call; }
uint64_t reply_of(uint32_t call) { return 200 + call; }

struct Setting {
  uint32_t entries = 2;
  bool looped = false;
  bool closes = false;  // the server ends the connection after its answers
};

void serve(const Setting& setting) {
  const Model memory;
  uint32_t head = 0;
  for (bool open = true; head < kCalls && open;) {
    uint32_t tail = memory.word(expertd::kTail).load(memory_order::acquire);
    if (tail == head) {
      expertd::announce_sleep(memory, expertd::kAsleep);
      tail = memory.word(expertd::kTail).load(memory_order::seq_cst);
      if (tail == head) {
        open = await_bell(kServer);
        if (open) memory.word(expertd::kAsleep).store(0, memory_order::relaxed);
        if (!open) tail = memory.word(expertd::kTail).load(memory_order::acquire);
      }
    }
    check(tail - head <= setting.entries, "the ring is overfull");
    for (; head < tail;) {
      const uint32_t call = head;
      const Entry entry = expertd::peek(memory, setting.entries, head);
      check(entry.slot == slot_of(call) && entry.kind == expertd::kRequest, "an entry is torn");
      const uint64_t length = memory.word(entry.slot + expertd::kRequestBytes).load(memory_order::relaxed);
      const uint64_t request = memory.word(entry.slot + expertd::kLine).load(memory_order::relaxed);
      check(length == 4 && request == request_of(call), "a request is torn");
      memory.word(expertd::kHead).store(++head, memory_order::release);
      memory.word(entry.slot + expertd::kLine + 4).store(reply_of(call), memory_order::relaxed);
      if (expertd::finish(memory, entry.slot, {4})) futex_wake(entry.slot);
      if (expertd::claim_bell(memory, expertd::kLooping)) send_bell(kCaller);
    }
  }
  if (setting.closes) close_connection();
}

void check_reply(uint32_t call) {
  const Model memory;
  const uint64_t length = memory.word(slot_of(call) + expertd::kReplyBytes).load(memory_order::relaxed);
  const uint64_t reply = memory.word(slot_of(call) + expertd::kLine + 4).load(memory_order::relaxed);
  check(length == 4 && reply == reply_of(call), "a reply is torn");
}

void post(const Setting& setting, uint32_t call) {
  const Model memory;
  memory.word(slot_of(call) + expertd::kLine).store(request_of(call), memory_order::relaxed);
  expertd::prepare(memory, slot_of(call), 4, 1024);
  if (expertd::push(memory, setting.entries, call, {slot_of(call), expertd::kRequest})) send_bell(kServer);
}

bool await(const Setting& setting, uint32_t call) {
  const Model memory;
  const Wait how = expertd::await(memory, slot_of(call), memory.word(kEnded), [](uint64_t slot) {
    futex_wait(slot);
    return Wait::kDone;
  });
  check(how == Wait::kDone || how == Wait::kEnded, "a wait ends in no known way");
  check(how == Wait::kDone || !setting.closes, "a call that was answered before the end is lost");
  if (how == Wait::kDone) check_reply(call);
  return how == Wait::kDone;
}

// A thread that sleeps on its calls; a full ring makes it wait for the first
// before it posts the second.
void call(const Setting& setting) {
  const Model memory;
  uint32_t awaited = 0;
  for (uint32_t next = 0; next < kCalls; next++) {
    if (next - memory.word(expertd::kHead).load(memory_order::acquire) >= setting.entries && !await(setting, awaited++))
      return;
    post(setting, next);
  }
  while (awaited < kCalls && await(setting, awaited)) awaited++;
}

// An event loop that sleeps on its socket.
void loop(const Setting& setting) {
  const Model memory;
  for (uint32_t next = 0; next < kCalls; next++) post(setting, next);
  bool open = true;
  for (uint32_t done = 0; done < kCalls;) {
    expertd::announce_sleep(memory, expertd::kLooping);
    const uint32_t before = done;
    while (done < kCalls && memory.word(slot_of(done)).load(memory_order::seq_cst) == expertd::kDone)
      check_reply(done++);
    if (done == before && !open) return;
    if (done == before) open = await_bell(kCaller);
  }
}

// The caller's loop thread, as far as the end concerns it.
void release_at_end(const Setting&) {
  const Model memory;
  while (await_bell(kCaller)) {
  }
  memory.word(kEnded).store(1, memory_order::seq_cst);
  for (uint32_t call = 0; call < kCalls; call++) {
    expertd::release(memory, slot_of(call));
    futex_wake(slot_of(call));
  }
}

// ---- the explorer

struct Thread {
  int process;
  std::function<void()> body;
};

struct Scenario {
  std::vector<Thread> threads;
  int killed = -1;  // the process that may be killed at every step
};

struct Pending {
  int at;
  uint64_t value;
  memory_order order;
};

struct Step {
  std::string text;
  std::shared_ptr<const Step> before;
};

struct State {
  struct Progress {
    std::vector<uint64_t> results;
    std::vector<Pending> buffer;
    int asleep = -1;  // on this word
    bool dead = false;
    Op next;
  };
  std::vector<uint64_t> words;
  std::vector<Progress> threads;
  int bells[2] = {0, 0};
  bool ended = false, killed = false;
  std::shared_ptr<const Step> trace;
};

class Explorer {
 public:
  Explorer(Scenario scenario, int weakened) : scenario_(std::move(scenario)), weakened_(weakened) {}

  // The number of states; throws Violation.
  size_t run() {
    State first;
    first.words.resize(64);
    first.threads.resize(scenario_.threads.size());
    guarded(first, [&](State& state) {
      for (size_t i = 0; i < state.threads.size(); i++) find_next(state, i);
    });
    push(std::move(first));
    while (!stack_.empty()) {
      const State state = std::move(stack_.back());
      stack_.pop_back();
      expand(state);
    }
    return seen_.size();
  }

  void print_sites() const {
    for (const auto& [name, number] : sites_) std::printf("site %d: %s\n", number, name.c_str());
  }

 private:
  void expand(const State& state) {
    bool moved = false, alive = false;
    for (size_t i = 0; i < state.threads.size(); i++) {
      const auto& thread = state.threads[i];
      for (size_t j = 0; j < thread.buffer.size(); j++) {
        if (may_flush(thread.buffer, j))
          moved |= follow(state, i, "flush", [j](State& to, size_t t) { flush(to, t, j); });
      }
      if (thread.dead || thread.next.kind == kReturn) continue;
      alive = true;
      if (thread.asleep < 0 && enabled(state, thread)) {
        moved |= follow(state, i, kNames[thread.next.kind], [this](State& to, size_t t) { step(to, t); });
      }
    }
    if (scenario_.killed >= 0 && !state.killed) {
      moved |= follow(state, 0, "kill", [this](State& to, size_t) { kill(to); });
    }
    if (!moved && alive) fail(state, "a thread sleeps for ever");
  }

  // A later store to another word may overtake a relaxed one, and nothing may
  // be overtaken by a release.
  static bool may_flush(const std::vector<Pending>& buffer, size_t index) {
    if (buffer[index].order != memory_order::relaxed) return index == 0;
    for (size_t i = 0; i < index; i++) {
      if (buffer[i].at == buffer[index].at) return false;
    }
    return true;
  }

  static void flush(State& state, size_t thread, size_t index) {
    auto& buffer = state.threads[thread].buffer;
    state.words[buffer[index].at] = buffer[index].value;
    buffer.erase(buffer.begin() + static_cast<ptrdiff_t>(index));
  }

  static bool enabled(const State& state, const State::Progress& thread) {
    const Op& op = thread.next;
    switch (op.kind) {
      case kLoad:
        if (op.order != memory_order::seq_cst) return true;
        for (const Pending& store : thread.buffer) {
          if (store.order == memory_order::seq_cst) return false;
        }
        return true;
      case kExchange:
      case kCompare:
        if (op.order != memory_order::relaxed) return thread.buffer.empty();
        for (const Pending& store : thread.buffer) {
          if (store.at == op.at) return false;
        }
        return true;
      case kAwaitBell:
        return state.bells[op.at] > 0 || state.ended;
      case kFutexWait:
      case kFutexWake:
      case kClose:
        return thread.buffer.empty();
      default:
        return true;
    }
  }

  void step(State& state, size_t index) {
    auto& thread = state.threads[index];
    const Op op = thread.next;
    uint64_t& word = state.words[op.at];
    uint64_t result = 0;
    switch (op.kind) {
      case kLoad:
        result = word;
        for (const Pending& store : thread.buffer) {
          if (store.at == op.at) result = store.value;
        }
        break;
      case kStore:
        thread.buffer.push_back({op.at, op.value, op.order});
        break;
      case kExchange:
        result = std::exchange(word, op.value);
        break;
      case kCompare:
        result = word;
        if (word == op.expected) word = op.value;
        break;
      case kFutexWait:
        if (word == op.expected) {
          thread.asleep = op.at;
          return;
        }
        break;
      case kFutexWake:
        for (size_t i = 0; i < state.threads.size(); i++) {
          if (std::exchange(state.threads[i].asleep, state.threads[i].asleep == op.at ? -1 : state.threads[i].asleep) ==
                  op.at &&
              !state.threads[i].dead) {
            state.threads[i].results.push_back(1);
            find_next(state, i);
          }
        }
        break;
      case kSendBell:
        state.bells[op.at]++;
        break;
      case kAwaitBell:
        result = state.bells[op.at] > 0;
        state.bells[op.at] = 0;
        break;
      case kClose:
        state.ended = true;
        break;
      case kReturn:
        return;
    }
    thread.results.push_back(result);
    find_next(state, index);
  }

  // What was stored is stored: the kernel's own work on the way out of a
  // process drains its buffers.
  void kill(State& state) {
    state.killed = state.ended = true;
    for (size_t i = 0; i < state.threads.size(); i++) {
      if (scenario_.threads[i].process != scenario_.killed) continue;
      auto& thread = state.threads[i];
      while (!thread.buffer.empty()) flush(state, i, 0);
      thread.dead = true;
      thread.asleep = -1;
    }
  }

  void find_next(State& state, size_t index) {
    running = {&state.threads[index].results, 0, {}};
    try {
      scenario_.threads[index].body();
      state.threads[index].next = {};
    } catch (const Unknown&) {
      Op op = running.pending;
      const int site = site_of(index, op);
      if (site == weakened_) op.order = memory_order::relaxed;
      state.threads[index].next = op;
    }
  }

  // Places of the protocol whose memory order matters: what is done, by which
  // end, to which word.
  int site_of(size_t thread, const Op& op) {
    if (op.kind > kCompare || op.order == memory_order::relaxed || op.order == memory_order::acquire) return -1;
    std::string name =
        std::string(scenario_.threads[thread].process == kServer ? "server" : "caller") + " " + kNames[op.kind];
    for (const auto& [at, word] : std::map<uint64_t, const char*>{{expertd::kTail, "tail"},
                                                                  {expertd::kHead, "head"},
                                                                  {expertd::kAsleep, "asleep"},
                                                                  {expertd::kLooping, "looping"},
                                                                  {kEnded, "ended"}}) {
      if (number_of(at) == op.at)
        return sites_.try_emplace(name + " " + word, static_cast<int>(sites_.size())).first->second;
    }
    return sites_.try_emplace(name + " state", static_cast<int>(sites_.size())).first->second;
  }

  template <class Move>
  bool follow(const State& state, size_t thread, const char* what, Move&& move) {
    State next = state;
    next.trace = std::make_shared<Step>(Step{std::to_string(thread) + " " + what + " " +
                                                 std::to_string(state.threads[thread].next.at) + " " +
                                                 std::to_string(state.threads[thread].next.value),
                                             state.trace});
    guarded(next, [&](State& to) { move(to, thread); });
    push(std::move(next));
    return true;
  }

  template <class Change>
  void guarded(State& state, Change&& change) {
    try {
      change(state);
    } catch (const Violation& violation) {
      fail(state, violation.text);
    }
  }

  [[noreturn]] void fail(const State& state, const std::string& text) {
    std::string steps;
    for (auto step = state.trace; step; step = step->before) steps = step->text + "; " + steps;
    throw Violation{text + ", after: " + steps};
  }

  void push(State state) {
    if (seen_.insert(key_of(state)).second) stack_.push_back(std::move(state));
  }

  static unsigned __int128 key_of(const State& state) {
    unsigned __int128 key = 0;
    auto add = [&key](uint64_t value) {
      key = (key ^ value) * ((static_cast<unsigned __int128>(0x9e3779b97f4a7c15) << 64) | 0xd1342543de82ef95);
      key ^= key >> 61;
    };
    for (const uint64_t word : state.words) add(word);
    for (const auto& thread : state.threads) {
      add(thread.results.size());
      for (const uint64_t result : thread.results) add(result);
      add(thread.buffer.size());
      for (const Pending& store : thread.buffer) {
        add(static_cast<uint64_t>(store.at) << 8 | static_cast<uint64_t>(store.order));
        add(store.value);
      }
      add(static_cast<uint64_t>(thread.asleep + 1) << 1 | thread.dead);
    }
    add(static_cast<uint64_t>(state.bells[0]) << 32 | static_cast<uint64_t>(state.bells[1]));
    add(static_cast<uint64_t>(state.ended) << 1 | state.killed);
    return key;
  }

  struct Hash {
    size_t operator()(unsigned __int128 key) const { return static_cast<size_t>(key >> 64); }
  };

  const Scenario scenario_;
  const int weakened_;
  std::map<std::string, int> sites_;
  std::vector<State> stack_;
  std::unordered_set<unsigned __int128, Hash> seen_;
};

Scenario scenario_of(const std::string& name) {
  auto thread = [](int process, void (*body)(const Setting&), const Setting& setting) {
    return Thread{process, [body, setting] { body(setting); }};
  };
  const Setting plain, narrow{.entries = 1}, closing{.closes = true};
  const std::vector<Thread> pair{thread(kServer, serve, plain), thread(kCaller, call, plain)};
  if (name == "calls") return {pair, -1};
  if (name == "narrow") return {{thread(kServer, serve, narrow), thread(kCaller, call, narrow)}, -1};
  if (name == "loop") return {{thread(kServer, serve, plain), thread(kCaller, loop, plain)}, -1};
  if (name == "loop-killed-server") return {{thread(kServer, serve, plain), thread(kCaller, loop, plain)}, kServer};
  if (name == "killed-caller") return {pair, kCaller};
  if (name == "killed-server") return {{pair[0], pair[1], thread(kCaller, release_at_end, plain)}, kServer};
  if (name == "closes") {
    return {{thread(kServer, serve, closing), thread(kCaller, call, closing), thread(kCaller, release_at_end, closing)},
            -1};
  }
  std::fprintf(stderr, "no such scenario: %s\n", name.c_str());
  std::exit(2);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  Explorer explorer(scenario_of(argv[1]), argc > 3 ? std::atoi(argv[3]) : -2);
  try {
    std::printf("states: %zu\n", explorer.run());
    explorer.print_sites();
    return 0;
  } catch (const Violation& violation) {
    explorer.print_sites();
    std::printf("violation: %s\n", violation.text.c_str());
    return 1;
  }
}
