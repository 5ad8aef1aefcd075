// Threads on shared sequences through the registry, one arena under all of them: for ThreadSanitizer and AddressSanitizer, and for the
// promises that must hold whatever the order.
//
//   tsan_harness [THREADS] [OPERATIONS] [SEED]
//
// The value at a position depends on the position only, so what any sequence holds can be checked at any time, whoever wrote it:
// exactly where it is FP16, within the format's step where it is packed. Exit code 1 on any failure.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attention/attention.hpp"
#include "core/thread_pool.hpp"
#include "kv/registry.hpp"

namespace {

using namespace inferos;      // NOLINT(google-build-using-namespace): a program, not a library
using namespace inferos::kv;  // NOLINT(google-build-using-namespace)

constexpr std::size_t kSequences = 6;
constexpr std::size_t kDim = 16;
constexpr std::size_t kHeads = 2;  // kv heads of every layer
constexpr std::int64_t kLongest = 220;
constexpr std::size_t kArenaBytes = std::size_t{4} << 20;

// A multiple of 1/8 in -2..2: exact in fp16.
float value_at(std::int64_t position, std::size_t channel, bool value) {
  const std::int64_t n = position * 7 + static_cast<std::int64_t>(channel) * 5 + (value ? 11 : 0);
  return static_cast<float>(n % 33 - 16) / 8.0F;
}

class Harness {
 public:
  Harness(std::size_t operations, std::uint64_t seed) : left_(static_cast<std::int64_t>(operations)), seed_(seed) {
    for (std::size_t i = 0; i < kSequences; ++i) handles_[i].store(open(i));
  }

  bool run(std::size_t threads) {
    std::vector<std::thread> workers;
    workers.reserve(threads);
    for (std::size_t t = 0; t < threads; ++t) workers.emplace_back([this, t] { work(seed_ * 1000 + t); });
    for (std::thread& worker : workers) worker.join();
    for (auto& handle : handles_) close_sequence(handle.load());
    const ArenaStats stats = arena_->stats();
    check(stats.live_blocks == 0 && stats.used_bytes == 0, "blocks are left in the arena");
    check(std::all_of(stats.used_by_tag.begin(), stats.used_by_tag.end(), [](std::size_t n) { return n == 0; }),
          "a tag is left");
    check(stats.reserved_high_water_bytes <= kArenaBytes, "the budget was exceeded");
    check(open_sequences() == 0, "sequences are left open");
    std::printf("%lld calls refused as busy, closed, out of order or over budget\n",
                static_cast<long long>(refused_.load()));
    std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed_.load()),
                static_cast<long long>(failed_.load()));
    return failed_.load() == 0;
  }

 private:
  Handle open(std::size_t which) {
    CacheOptions options;
    options.layers = {{kHeads, kDim, -1}, {kHeads, kDim, 90}};
    const auto format = static_cast<Format>(which % kernels::kFormats);
    options.formats.assign(2, which >= kernels::kFormats ? Format::kInt4 : format);
    if (which >= kernels::kFormats) options.policy = Policy{{1.0, 0.7, 0.3}, 0.9};
    options.recent_window = 16 + 16 * (which % 3);
    options.sink_tokens = which % 2 == 0 ? 4 : 0;
    return open_sequence(std::make_unique<SequenceCache>(std::move(options), arena_));
  }

  void work(std::uint64_t seed) {
    std::mt19937_64 random(seed);
    while (left_.fetch_sub(1, std::memory_order_relaxed) > 0) {
      const std::size_t which = random() % kSequences;
      try {
        operate(which, random);
        passed_.fetch_add(1, std::memory_order_relaxed);
      } catch (const Error& error) {
        refuse(error, handles_[which].load());
      } catch (const std::exception& error) {
        check(false, error.what());
      }
    }
  }

  // What another thread may have caused is a correct answer; anything else is not.
  void refuse(const Error& error, Handle handle) {
    const ErrorCode code = error.code();
    const bool expected = code == ErrorCode::kBusy || code == ErrorCode::kClosed || code == ErrorCode::kSequence ||
                          code == ErrorCode::kRewind || code == ErrorCode::kBudget;
    check(expected, error.what());
    refused_.fetch_add(1, std::memory_order_relaxed);
    keep_error(handle, error);
    (void)take_error(handle);
  }

  void operate(std::size_t which, std::mt19937_64& random) {
    const Handle handle = handles_[which].load();
    const std::uint64_t kind = random() % 100;
    if (kind < 35) {
      step(handle, random);
    } else if (kind < 55) {
      step_by_layer(handle, random);
    } else if (kind < 80) {
      inspect(handle, random);
    } else if (kind < 88) {
      demote(handle, random);
    } else if (kind < 92) {
      rewind(handle, random);
    } else if (kind < 95) {
      // The lease ends before anything is closed: closing waits for leases, its own thread's too.
      const Handle copy = open_sequence(Lease(handle)->fork());
      replace(random() % kSequences, copy);
    } else if (kind < 97) {
      replace(which, open(which));
    } else if (kind < 98) {
      ThreadPool::process().resize(static_cast<std::int64_t>(random() % 5 + 1));
      once_each(random() % 40);
    } else if (kind < 99) {
      Handle old = handle;
      const Handle renewed = abandon(handle);
      // Another thread may have replaced the handle meanwhile: then this one names nothing any more.
      if (!handles_[which].compare_exchange_strong(old, renewed)) close_sequence(renewed);
    } else {
      check(arena_->stats().reserved_bytes <= kArenaBytes, "the budget is exceeded");
    }
  }

  void replace(std::size_t which, Handle handle) {
    const Handle old = handles_[which].exchange(handle);
    try {
      close_sequence(old);
    } catch (const Error& error) {
      // Somebody is abandoning it, and will close what becomes of it.
      check(error.code() == ErrorCode::kClosed, error.what());
    }
  }

  static std::int64_t tokens_of(std::mt19937_64& random) {
    return random() % 16 == 0 ? static_cast<std::int64_t>(random() % 90 + 1)
                              : static_cast<std::int64_t>(random() % 3 + 1);
  }

  static std::vector<float> rows(std::int64_t from, std::int64_t tokens, bool value) {
    std::vector<float> out;
    for (std::int64_t p = from; p < from + tokens; ++p) {
      for (std::size_t c = 0; c < kHeads * kDim; ++c) out.push_back(value_at(p, c, value));
    }
    return out;
  }

  // A whole step in one hold, as the sequence API does it.
  void step(Handle handle, std::mt19937_64& random) {
    Lease lease(handle);
    if (lease->length() > kLongest) lease->clear();
    const std::int64_t tokens = tokens_of(random);
    lease->begin(tokens);
    const std::vector<float> k = rows(lease->length(), tokens, false);
    const std::vector<float> v = rows(lease->length(), tokens, true);
    for (std::size_t layer = 0; layer < 2; ++layer) {
      lease->append(layer, k.data(), v.data(), ThreadPool::process());
      attend(lease, layer, tokens);
    }
    if (random() % 10 == 0) {
      lease->rollback();
    } else {
      lease->commit();
    }
  }

  // A hold per layer, as the op does it: other threads come in between.
  void step_by_layer(Handle handle, std::mt19937_64& random) {
    const std::int64_t tokens = tokens_of(random);
    std::int64_t past = 0;
    {
      const Lease lease(handle);
      past = lease->length() + (random() % 4 == 0 ? lease->pending() : 0);
    }
    if (past > kLongest) past = 0;
    const std::vector<float> k = rows(past, tokens, false);
    const std::vector<float> v = rows(past, tokens, true);
    for (std::size_t layer = 0; layer < 2; ++layer) {
      Lease lease(handle);
      lease->enter(layer, past, tokens);
      lease->append(layer, k.data(), v.data(), ThreadPool::process());
      attend(lease, layer, tokens);
    }
  }

  void attend(Lease& lease, std::size_t layer, std::int64_t tokens) {
    const auto count = static_cast<std::size_t>(tokens);
    const std::vector<float> q(count * kHeads * kDim, 0.1F);
    std::vector<float> out(q.size());
    const attention::Row row{&*lease, q.data(), out.data(), count, nullptr};
    attention::run({&row, 1}, {layer, kHeads, 0.0F, 0.0F}, ThreadPool::process());
    // A mean of values within -2..2, a step of INT4 and its rotation aside.
    check(std::all_of(out.begin(), out.end(), [](float x) { return std::abs(x) <= 3.0F; }),
          "attention is out of range");
  }

  // Every task runs once and what it wrote is seen by the caller, whose own tasks may call again.
  void once_each(std::size_t count) {
    struct Task {
      std::vector<int> runs;  // by outer task, two each
      static void outer(void* context, std::size_t i) {
        ThreadPool::process().parallel_for(2, &Task::inner, &static_cast<Task*>(context)->runs[2 * i]);
      }
      static void inner(void* context, std::size_t i) { static_cast<int*>(context)[i] += 1; }
    };
    Task task{std::vector<int>(2 * count)};
    ThreadPool::process().parallel_for(count, &Task::outer, &task);
    check(std::all_of(task.runs.begin(), task.runs.end(), [](int runs) { return runs == 1; }),
          "tasks were not run once");
  }

  void inspect(Handle handle, std::mt19937_64& random) {
    const Lease lease(handle);
    const TierBytes tiers = lease->tier_bytes();
    std::size_t bytes = tiers.score_bytes;
    for (const std::size_t tier : tiers.bytes) bytes += tier;
    check(bytes <= kArenaBytes, "a sequence counts more than the arena holds");
    const std::int64_t length = lease->length();
    const std::int64_t from = lease->kept_from();
    if (length == from) return;
    const std::int64_t position =
        from + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(length - from));
    const std::size_t layer = random() % 2;
    const std::size_t head = random() % kHeads;
    std::array<float, kDim> k{};
    std::array<float, kDim> v{};
    Format format{};
    lease->read(layer, head, position, k.data(), v.data(), &format);
    const double allowed = format == Format::kF16 ? 0.0 : format == Format::kInt8 ? 0.02 : 1.5;  // INT4 twice, rotated
    for (std::size_t c = 0; c < kDim; ++c) {
      const double k_off = std::abs(k[c] - value_at(position, head * kDim + c, false));
      const double v_off = std::abs(v[c] - value_at(position, head * kDim + c, true));
      check(k_off <= allowed && v_off <= allowed, "position " + std::to_string(position) + " came back wrong");
    }
  }

  void demote(Handle handle, std::mt19937_64& random) {
    const Lease lease(handle);
    const std::size_t layer = random() % 2;
    const std::size_t blocks = lease->grid_blocks(layer);
    if (blocks == 0) return;
    lease->demote(layer, random() % kHeads, random() % blocks, static_cast<Format>(random() % kernels::kFormats));
  }

  void rewind(Handle handle, std::mt19937_64& random) {
    const Lease lease(handle);
    lease->rewind(static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(lease->length() + 1)));
  }

  void check(bool holds, const std::string& what) {
    if (holds) return;
    if (failed_.fetch_add(1) < 20) {
      const std::scoped_lock lock(print_);
      std::printf("FAIL %s\n", what.c_str());
    }
  }

  std::shared_ptr<Arena> arena_ = std::make_shared<Arena>(kArenaBytes);
  std::array<std::atomic<Handle>, kSequences> handles_{};
  std::atomic<std::int64_t> left_;
  std::uint64_t seed_;
  std::atomic<std::int64_t> passed_{0};
  std::atomic<std::int64_t> failed_{0};
  std::atomic<std::int64_t> refused_{0};
  std::mutex print_;
};

long long argument(int argc, char** argv, int index, long long absent) {
  return argc > index ? std::strtoll(argv[index], nullptr, 10) : absent;
}

}  // namespace

int main(int argc, char** argv) {
  const long long threads = argument(argc, argv, 1, 4);
  const long long operations = argument(argc, argv, 2, 20000);
  const long long seed = argument(argc, argv, 3, 1);
  if (threads < 1 || threads > 64 || operations < 1) {
    std::fprintf(stderr, "usage: tsan_harness [THREADS] [OPERATIONS] [SEED]   for example 4 1000000\n");
    return 2;
  }
  Harness harness(static_cast<std::size_t>(operations), static_cast<std::uint64_t>(seed));
  return harness.run(static_cast<std::size_t>(threads)) ? 0 : 1;
}
