#include "core/thread_pool.hpp"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

#if defined(_WIN32)
#include "core/windows.hpp"
#else
#include <dlfcn.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

#if defined(INFEROS_X86)
#include <immintrin.h>
#endif

#include "core/error.hpp"

namespace inferos {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kLooks = 500;  // of the caller at the end of its call: about 20 us
// Between two calls this close, putting a worker to sleep and waking it costs both sides more than its looking for the second.
constexpr auto kSoon = std::chrono::microseconds{40};

void pause() noexcept {
#if defined(INFEROS_X86)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Two processes with a common ancestor have different ones. Windows has no fork.
std::int64_t process_id() noexcept {
#if defined(_WIN32)
  return 0;
#else
  return getpid();
#endif
}

// Sleeping workers stand in this library's code: from now on nothing unloads it. They are never joined, because the moments at
// which one could (static destructors, the unloading of a Windows DLL) are those at which a join may wait for ever.
void stay_loaded() noexcept {
#if defined(_WIN32)
  HMODULE self = nullptr;
  GetModuleHandleExW(GET_MODULE_HANDLE_EX_FLAG_PIN | GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS,
                     reinterpret_cast<LPCWSTR>(&stay_loaded), &self);
#else
  Dl_info self{};
  if (dladdr(reinterpret_cast<void*>(&stay_loaded), &self) != 0) {
    dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE);
  }
#endif
}

std::int64_t cores() noexcept {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return std::thread::hardware_concurrency();  // 0 where it is not known
}

// The core that this thread is on, or -1.
int core_here() noexcept {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Virtual machines wake a thread on its waker's core while another sleeps, where the two then take turns for milliseconds. From now on
// this thread runs on the other cores of the process.
void leave_core([[maybe_unused]] int core) noexcept {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(getpid(), sizeof(allowed), &allowed) != 0) return;
  CPU_CLR(static_cast<std::size_t>(core), &allowed);
  if (CPU_COUNT(&allowed) > 0) sched_setaffinity(0, sizeof(allowed), &allowed);
#endif
}

std::int64_t checked_threads(const char* name, std::int64_t threads) {
  if (threads >= 1 && threads <= kMaxThreads) return threads;
  throw Error(ErrorCode::kConfig,
              std::string(name) + ": " + std::to_string(threads) + " is not within 1.." + std::to_string(kMaxThreads));
}

std::int64_t threads_at_start() {
  const char* wanted = std::getenv("INFEROS_THREADS");
  if (wanted == nullptr || *wanted == '\0') return std::clamp<std::int64_t>(cores(), 1, kMaxThreads);
  std::int64_t threads = 0;
  const char* const end = wanted + std::strlen(wanted);
  const auto [stop, error] = std::from_chars(wanted, end, threads);
  if (error != std::errc{} || stop != end) {
    throw Error(ErrorCode::kConfig, "INFEROS_THREADS: '" + std::string(wanted) + "' is not a whole number within 1.." +
                                        std::to_string(kMaxThreads));
  }
  return checked_threads("INFEROS_THREADS", threads);
}

}  // namespace

// The workers of one process and the call they work on. Never freed: a worker may wake up at any time.
struct ThreadPool::Crew {
  const std::int64_t process = process_id();
  const std::size_t own_cores = static_cast<std::size_t>(cores());
  std::atomic<bool> taken{false};  // by a call; what has no lock below is the holder's
  std::size_t workers = 0;         // started
  Clock::time_point ended;         // the last call

  std::mutex mutex;
  std::condition_variable call;  // to the workers: there are seats
  std::condition_variable left;  // to the caller: nobody is inside
  bool brisk = false;            // whether the last two calls were less than kSoon apart, with a core for each thread
  std::atomic<std::size_t> inside{0};  // workers that have joined; written under the lock

  alignas(64) std::atomic<std::size_t> seats{0};  // workers that may still join; written under the lock

  // The call. It changes only while nobody is inside and no seat is free.
  int core = -1;  // of the caller
  void (*fn)(void*, std::size_t) = nullptr;
  void* context = nullptr;
  std::size_t count = 0;
  alignas(64) std::atomic<std::size_t> next{0};  // by one at a time, so that tasks of unequal length balance

  void run_tasks() noexcept {
    for (std::size_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      fn(context, i);
    }
  }

  // Wakes two; each that joins wakes two more. The caller of many workers is not held up by waking all of them.
  void rouse(std::size_t free_seats) noexcept {
    for (std::size_t i = 0; i < std::min<std::size_t>(free_seats, 2); ++i) call.notify_one();
  }

  void serve() noexcept {
    std::unique_lock lock(mutex);
    for (;;) {
      if (brisk && seats == 0) {
        lock.unlock();
        const auto until = Clock::now() + kSoon;
        while (seats.load(std::memory_order_relaxed) == 0 && Clock::now() < until) pause();
        lock.lock();
      }
      call.wait(lock, [this] { return seats > 0; });
      const std::size_t free_seats = --seats;
      ++inside;
      lock.unlock();
      rouse(free_seats);
      if (core >= 0 && core == core_here()) leave_core(core);
      run_tasks();
      lock.lock();
      if (--inside == 0) left.notify_one();
    }
  }

  // Where the system gives no more threads, those that are there do the work.
  void start(std::size_t wanted) noexcept {
    if (workers == 0 && wanted > 0) stay_loaded();
    try {
      for (; workers < wanted; ++workers) std::thread(&Crew::serve, this).detach();
    } catch (const std::exception&) {
      return;
    }
  }

  void run(std::size_t helpers) noexcept {
    start(helpers);
    next.store(0, std::memory_order_relaxed);
    core = core_here();
    {
      const bool soon = helpers < own_cores && Clock::now() - ended < kSoon;
      const std::scoped_lock lock(mutex);
      brisk = soon;
      seats = std::min(helpers, workers);
    }
    rouse(std::min(helpers, workers));
    run_tasks();
    {
      const std::scoped_lock lock(mutex);
      seats = 0;  // who has not come by now is not waited for
    }
    // The workers' last tasks end about when the caller's do, sooner than a sleeper wakes up.
    for (std::size_t i = 0; i < kLooks && inside.load(std::memory_order_acquire) != 0; ++i) pause();
    if (inside.load(std::memory_order_acquire) != 0) {
      std::unique_lock lock(mutex);
      left.wait(lock, [this] { return inside.load(std::memory_order_relaxed) == 0; });
    }
    ended = Clock::now();
  }
};

ThreadPool& ThreadPool::process() {
  // Never freed: other threads may still call while static objects are destroyed.
  static ThreadPool& pool = *std::make_unique<ThreadPool>(static_cast<std::size_t>(threads_at_start())).release();
  return pool;
}

ThreadPool::Crew& ThreadPool::crew() {
  Crew* current = crew_.load(std::memory_order_acquire);
  if (current != nullptr && current->process == process_id()) return *current;
  // The parent's crew is left alone: its lock may have been held when the process forked.
  auto fresh = std::make_unique<Crew>();
  if (crew_.compare_exchange_strong(current, fresh.get(), std::memory_order_acq_rel)) return *fresh.release();
  return *current;
}

void ThreadPool::parallel_for(std::size_t count, void (*fn)(void*, std::size_t), void* context) {
  const std::size_t helpers = std::min(count, concurrency()) - (count > 0 ? 1 : 0);
  if (helpers > 0) {
    Crew& workers = crew();
    if (!workers.taken.exchange(true, std::memory_order_acquire)) {
      workers.fn = fn;
      workers.context = context;
      workers.count = count;
      workers.run(helpers);
      workers.taken.store(false, std::memory_order_release);
      return;
    }
  }
  for (std::size_t i = 0; i < count; ++i) fn(context, i);
}

void ThreadPool::resize(std::int64_t threads) {
  threads_.store(static_cast<std::size_t>(checked_threads("set_num_threads", threads)), std::memory_order_relaxed);
}

}  // namespace inferos
