// The pool and the sharing out of tasks: each task is done once and is done when the call returns, whether calls follow each other at
// once (workers look for the next one) or after a while (they sleep), with fewer and more threads than cores.
//
//   threads [CALLS]
//
// Exit code 1 on any failure. Meant for ThreadSanitizer, too: what the tasks write is plain memory that the caller reads.

#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "core/parts.hpp"
#include "core/thread_pool.hpp"

namespace {

using inferos::Parts;
using inferos::ThreadPool;

constexpr std::size_t kTasks = 37;

struct Call {
  Parts parts;
  std::vector<unsigned> done = std::vector<unsigned>(kTasks);

  static void run(void* context, std::size_t own) {
    auto& call = *static_cast<Call*>(context);
    call.parts.work(own, [&call](std::size_t task, std::size_t then) {
      if (then == Parts::kNone || then < kTasks) ++call.done[task];
    });
  }
};

bool every_task_once(ThreadPool& pool, std::size_t parts) {
  Call call{Parts(kTasks, parts)};
  pool.parallel_for(call.parts.size(), &Call::run, &call);
  for (const unsigned times : call.done) {
    if (times != 1) return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const long long calls = argc > 1 ? std::strtoll(argv[1], nullptr, 10) : 10000;
  const auto cores = static_cast<std::size_t>(std::thread::hardware_concurrency());
  int failed = 0;
  for (const std::size_t threads : {std::size_t{1}, cores, cores + 3}) {
    ThreadPool pool(threads);
    for (long long i = 0; i < calls; ++i) {
      const std::size_t parts = 1 + static_cast<std::size_t>(i) % kTasks;
      if (!every_task_once(pool, parts)) ++failed;
      if (i % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(i % 256));
    }
  }
  std::printf("%d of %lld calls for each number of threads failed\n", failed, calls);
  return failed == 0 ? 0 : 1;
}
