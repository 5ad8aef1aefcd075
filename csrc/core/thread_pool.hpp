#pragma once
// The process's own threads, for calls from outside ONNX Runtime; inside the op its pool is used.

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "core/executor.hpp"

namespace inferos {

inline constexpr std::int64_t kMaxThreads = 1024;

// One per process, never destroyed; thread-safe. The caller takes part in its own call; workers start at the first call that has
// more than one task, and sleep between calls. They look for the next one, for 40 us at most, only after two calls less than 40 us
// apart and where every thread has a core. While one caller's tasks run, any other (a task that calls again, too) runs its tasks
// alone: callers do not multiply the workers. A forked child starts workers of its own.
class ThreadPool final : public Executor {
 public:
  // The first call reads the environment variable INFEROS_THREADS; without it there are as many threads as the process has cores.
  // Throws Error{kConfig} where it is no number within 1..kMaxThreads.
  static ThreadPool& process();

  explicit ThreadPool(std::size_t threads) noexcept : threads_(threads) {}
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  void parallel_for(std::size_t count, void (*fn)(void* context, std::size_t i), void* context) override;
  std::size_t concurrency() const noexcept override { return threads_.load(std::memory_order_relaxed); }
  // Threads of a call, the caller's own included; calls in flight keep theirs. Throws Error{kConfig} outside 1..kMaxThreads.
  void resize(std::int64_t threads);

 private:
  struct Crew;

  Crew& crew();

  std::atomic<std::size_t> threads_;
  std::atomic<Crew*> crew_{nullptr};  // of this process, or of the one it was forked from
};

}  // namespace inferos
