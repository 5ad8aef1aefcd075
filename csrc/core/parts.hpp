#pragma once
// Sharing out tasks that lie one after the other in memory.

#include <atomic>
#include <cstddef>
#include <vector>

namespace inferos {

// Each thread works through a part of its own in order, so that memory is read in few long streams, and then helps with the others':
// who comes late or is slow holds nobody up.
class Parts {
 public:
  static constexpr std::size_t kNone = ~std::size_t{0};

  Parts(std::size_t tasks, std::size_t parts) : parts_(parts) {
    for (std::size_t i = 0; i < parts; ++i) {
      parts_[i].next.store(tasks * i / parts, std::memory_order_relaxed);
      parts_[i].end = tasks * (i + 1) / parts;
    }
  }

  std::size_t size() const noexcept { return parts_.size(); }

  // Calls fn(task, then) until no task is left; called once for every part, by any thread. `then` is the task that the same thread
  // most likely has next, or kNone.
  template <class Fn>
  void work(std::size_t own, const Fn& fn) noexcept {
    for (std::size_t i = 0; i < parts_.size(); ++i) {
      Part& part = parts_[(own + i) % parts_.size()];
      while (part.next.load(std::memory_order_relaxed) < part.end) {
        const std::size_t task = part.next.fetch_add(1, std::memory_order_relaxed);
        if (task < part.end) fn(task, first_left(own + i));
      }
    }
  }

 private:
  struct alignas(64) Part {
    std::atomic<std::size_t> next{0};
    std::size_t end = 0;
  };

  std::size_t first_left(std::size_t from) const noexcept {
    for (std::size_t i = 0; i < parts_.size(); ++i) {
      const Part& part = parts_[(from + i) % parts_.size()];
      const std::size_t next = part.next.load(std::memory_order_relaxed);
      if (next < part.end) return next;
    }
    return kNone;
  }

  std::vector<Part> parts_;
};

}  // namespace inferos
