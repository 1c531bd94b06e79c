// A list that any thread adds to and one empties, without a lock.
#pragma once

#include <atomic>
#include <utility>
#include <vector>

namespace expertd {

// A list that any thread adds to and one thread empties, without a lock: what is taken comes in the order of its
// adding.
template <typename T>
class Pile {
 public:
  Pile() = default;
  ~Pile() { take(); }
  Pile(const Pile&) = delete;
  Pile& operator=(const Pile&) = delete;

  void add(T value) {
    Node* node = new Node{std::move(value), head_.load(std::memory_order_relaxed)};
    // seq_cst: a bell is rung after it, and who sleeps looks here after arming that.
    while (!head_.compare_exchange_weak(node->next, node, std::memory_order_seq_cst, std::memory_order_relaxed)) {
    }
  }

  bool empty() const { return head_.load(std::memory_order_seq_cst) == nullptr; }

  std::vector<T> take() {
    std::vector<T> values;
    for (Node* node = head_.exchange(nullptr, std::memory_order_acquire); node != nullptr;) {
      values.push_back(std::move(node->value));
      delete std::exchange(node, node->next);
    }
    for (size_t i = 0, j = values.size(); i + 1 < j; ++i, --j) std::swap(values[i], values[j - 1]);
    return values;
  }

 private:
  struct Node {
    T value;
    Node* next;
  };
  std::atomic<Node*> head_{nullptr};
};

}  // namespace expertd
