// Attention does not depend on how its tasks are run: the same bits in any order, on any number of threads, alone or in a batch,
// for one query row or many. Prints one line per case; exit code 1 where a bit differs.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "attention/attention.hpp"
#include "core/arena.hpp"
#include "core/executor.hpp"
#include "core/thread_pool.hpp"
#include "kv/sequence_cache.hpp"

namespace {

using namespace inferos;

class Reversed final : public Executor {
 public:
  void parallel_for(std::size_t count, void (*fn)(void*, std::size_t), void* context) override {
    for (std::size_t i = count; i > 0; --i) fn(context, i - 1);
  }
  std::size_t concurrency() const noexcept override { return 1; }
};

// As if on many threads, in this one.
class Counting final : public Executor {
 public:
  explicit Counting(std::size_t threads) : threads_(threads) {}
  void parallel_for(std::size_t count, void (*fn)(void*, std::size_t), void* context) override {
    most = std::max(most, count);
    for (std::size_t i = 0; i < count; ++i) fn(context, i);
  }
  std::size_t concurrency() const noexcept override { return threads_; }

  std::size_t most = 0;  // tasks of a call

 private:
  std::size_t threads_;
};

struct Shape {
  std::size_t heads, kv_heads, d;
  std::int32_t window;
};

std::vector<float> normal(std::mt19937& random, std::size_t n) {
  std::normal_distribution<float> draw;
  std::vector<float> values(n);
  for (float& value : values) value = draw(random);
  return values;
}

std::unique_ptr<kv::SequenceCache> filled(const Shape& shape, kernels::Format format, std::int64_t tokens,
                                          unsigned seed) {
  kv::CacheOptions options;
  options.layers = {{shape.kv_heads, shape.d, shape.window}};
  options.formats = {format};
  auto cache = std::make_unique<kv::SequenceCache>(options, std::make_shared<Arena>(0));
  std::mt19937 random(seed);
  SerialExecutor serial;
  for (std::int64_t done = 0; done < tokens;) {
    const std::int64_t step = std::min<std::int64_t>(tokens - done, done % 3 == 0 ? 200 : 77);
    const std::size_t values = static_cast<std::size_t>(step) * shape.kv_heads * shape.d;
    cache->begin(step);
    cache->append(0, normal(random, values).data(), normal(random, values).data(), serial);
    cache->commit();
    done += step;
  }
  return cache;
}

struct Result {
  std::vector<float> out, mass;
};

Result attend(kv::SequenceCache& cache, const Shape& shape, const std::vector<float>& q, std::size_t tokens,
              Executor& executor) {
  Result result{std::vector<float>(q.size()),
                std::vector<float>(shape.kv_heads * static_cast<std::size_t>(cache.visible_length(0)))};
  const attention::Row row{&cache, q.data(), result.out.data(), tokens, result.mass.data()};
  attention::run(std::span(&row, 1), {0, shape.heads, 0.0F, 0.0F}, executor);
  return result;
}

int failures = 0;

void same(const std::vector<float>& got, const std::vector<float>& want, const char* what) {
  const bool equal = got.size() == want.size() && std::memcmp(got.data(), want.data(), got.size() * sizeof(float)) == 0;
  if (!equal) ++failures;
  std::printf("%s %s\n", equal ? "same" : "DIFFERENT", what);
}

void check(const Shape& shape, kernels::Format format) {
  const std::int64_t length = 3000;
  const auto cache = filled(shape, format, length, 1);
  std::mt19937 random(2);  // NOLINT(bugprone-random-generator-seed): the same numbers every time
  SerialExecutor serial;
  Reversed reversed;
  ThreadPool& threads = ThreadPool::process();
  const std::size_t width = shape.heads * shape.d;
  for (const std::size_t tokens : {std::size_t{1}, std::size_t{300}}) {
    const std::vector<float> q = normal(random, tokens * width);
    const Result want = attend(*cache, shape, q, tokens, serial);
    for (Executor* executor : {static_cast<Executor*>(&reversed), static_cast<Executor*>(&threads)}) {
      const Result got = attend(*cache, shape, q, tokens, *executor);
      same(got.out, want.out, tokens == 1 ? "decode, other order" : "prefill, other order");
      same(got.mass, want.mass, tokens == 1 ? "mass of decode" : "mass of prefill");
    }
    if (tokens == 1) continue;
    const std::vector<float> tail(q.end() - static_cast<std::ptrdiff_t>(37 * width), q.end());
    const Result part = attend(*cache, shape, tail, 37, serial);
    const std::vector<float> expected(want.out.end() - static_cast<std::ptrdiff_t>(37 * width), want.out.end());
    same(part.out, expected, "prefill of the last rows alone");
  }

  const auto other = filled(shape, format, 500, 3);
  const std::vector<float> q = normal(random, 2 * width);
  const std::vector<float> first(q.begin(), q.begin() + static_cast<std::ptrdiff_t>(width));
  std::vector<float> out(2 * width);
  const std::vector<attention::Row> rows{{cache.get(), q.data(), out.data(), 1, nullptr},
                                         {other.get(), q.data() + width, out.data() + width, 1, nullptr}};
  attention::run(rows, {0, shape.heads, 0.0F, 0.0F}, threads);
  out.resize(width);
  same(out, attend(*cache, shape, first, 1, serial).out, "a row alone and in a batch");
}

// A chunk of 128 tokens over 2 kv heads gives each of 16 threads a task, and the bits of one thread.
void check_split(std::size_t group) {
  const Shape shape{2 * group, 2, 64, -1};
  const auto cache = filled(shape, kernels::Format::kInt8, 700, 4);
  std::mt19937 random(5);  // NOLINT(bugprone-random-generator-seed): the same numbers every time
  const std::vector<float> q = normal(random, 128 * shape.heads * shape.d);
  SerialExecutor serial;
  const Result want = attend(*cache, shape, q, 128, serial);
  for (const std::size_t threads : {std::size_t{2}, std::size_t{5}, std::size_t{16}}) {
    Counting executor(threads);
    same(attend(*cache, shape, q, 128, executor).out, want.out, "prefill, split for more threads");
    if (executor.most >= threads) continue;
    ++failures;
    std::printf("FEW %zu tasks for %zu threads, group %zu\n", executor.most, threads, group);
  }
}

}  // namespace

int main() {
  for (const std::size_t group : {std::size_t{1}, std::size_t{4}, std::size_t{8}}) check_split(group);
  ThreadPool::process().resize(4);
  for (const Shape& shape : {Shape{8, 2, 64, -1}, Shape{3, 1, 80, -1}, Shape{4, 4, 16, 1000}}) {
    for (const auto format :
         {kernels::Format::kF16, kernels::Format::kInt8, kernels::Format::kK8V4, kernels::Format::kInt4}) {
      check(shape, format);
    }
  }
  return failures == 0 ? 0 : 1;
}
