// One query token per row: (row x kv head x context span) tasks over the blocks of a head, merged by log-sum-exp.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include "attention/plan.hpp"
#include "core/cpu.hpp"
#include "core/parts.hpp"
#include "kernels/hadamard.hpp"

namespace inferos::attention {
namespace {

using kernels::BlockView;
using kernels::kBlockTokens;

// A row is cut into about this many spans, none below kSpanBlocks. Constants, and not the number of threads or rows, so that
// neither changes a bit of the result.
constexpr std::size_t kSpansPerRow = 32;
constexpr std::size_t kSpanBlocks = 16;
static_assert(kSpansPerRow <= kBlockTokens);  // merge_spans
// First-level caches at least this large take what is read next directly, a tenth faster (Zen 5). In 32 KiB (Zen 4) it got in the way.
constexpr std::size_t kNearBytes = std::size_t{48} * 1024;
constexpr float kSkipped = 0x1p-24F;  // probabilities below this, all tokens of the context together, need no values
// The queries of a prefill that count for the mass: every 4th of the newest 64 ranks blocks nearly as all do (docs/benchmarks.md).
constexpr std::size_t kMassQueries = 64;
constexpr std::size_t kMassStride = 4;

struct Job {  // one kv head of one row
  const float* q;
  float* out;
  kernels::Visible visible;
  float skip_below;
  std::array<std::span<const BlockView>, kVisitOrder.size()> lists;  // in visit order
  std::size_t blocks;
  std::size_t spans;
  float* partials;        // [spans][partial_floats]
  std::uint16_t* seen_p;  // nullptr, or [blocks][group][64], [blocks][group]: DecodeTask
  float* seen_m;
  const RowPlan* row;
  std::size_t head;
  float* mass;  // [length], where the row wants it
};

struct Partial {
  float* o;  // [group][d]
  float* m;  // [group]
  float* l;  // [group]
};

// Whole cache lines, so that two threads never write to one.
std::size_t partial_floats(const Shape& shape) noexcept { return (shape.group * (shape.d + 2) + 15) / 16 * 16; }

Partial partial_at(const Job& job, const Shape& shape, std::size_t span) noexcept {
  float* base = job.partials + span * partial_floats(shape);
  float* const m = base + shape.group * shape.d;
  return {base, m, m + shape.group};
}

Job plan_job(const RowPlan& row, const Shape& shape, std::size_t head, std::size_t token) {
  const std::size_t offset = (token * shape.heads + head * shape.group) * shape.d;
  Job job{};
  job.q = row.q + offset;
  job.out = row.out + offset;
  job.visible = visible_at(row.position(token), shape.local_window);
  for (std::size_t i = 0; i < kVisitOrder.size(); ++i) {
    const auto& list = row.streams[head].by_format[static_cast<std::size_t>(kVisitOrder[i])];
    job.lists[i] = blocks_within(list, job.visible);
    job.blocks += job.lists[i].size();
  }
  job.spans =
      std::clamp<std::size_t>(std::min(kSpansPerRow / shape.kv_heads, job.blocks / kSpanBlocks), 1, kSpansPerRow);
  job.row = &row;
  job.head = head;
  if (row.mass != nullptr) job.mass = row.mass + head * static_cast<std::size_t>(row.length);
  job.skip_below = kSkipped / static_cast<float>(row.length);
  return job;
}

// Where the first block of the lists from `list` on lies.
const std::byte* first_from(const Job& job, std::size_t list) noexcept {
  while (list < job.lists.size() && job.lists[list].empty()) ++list;
  return list < job.lists.size() ? job.lists[list].front().data : nullptr;
}

// Where the first block of a span lies.
const std::byte* span_begin(const Job& job, std::size_t span) noexcept {
  std::size_t skipped = job.blocks * span / job.spans;
  for (const auto& list : job.lists) {
    if (skipped < list.size()) return list[skipped].data;
    skipped -= list.size();
  }
  return nullptr;
}

// Whether a span has met rotated values alone: its result stays rotated until the spans are merged.
bool ends_rotated(const Job& job, std::size_t span) noexcept {
  std::size_t rotated = 0;
  for (std::size_t i = 0; i < kVisitOrder.size() && kernels::v_is_rotated(kVisitOrder[i]); ++i)
    rotated += job.lists[i].size();
  return job.blocks * (span + 1) / job.spans <= rotated;
}

// `then`: what the same thread reads next, or nullptr.
void run_span(const Job& job, const Shape& shape, std::size_t span, const std::byte* then) noexcept {
  const std::size_t first = job.blocks * span / job.spans;
  const std::size_t last = job.blocks * (span + 1) / job.spans;
  const Partial partial = partial_at(job, shape, span);
  std::fill_n(partial.o, shape.group * shape.d, 0.0F);
  std::fill_n(partial.m, shape.group, -std::numeric_limits<float>::infinity());
  std::fill_n(partial.l, shape.group, 0.0F);

  bool rotated = false;
  std::size_t list_begin = 0;
  for (std::size_t i = 0; i < kVisitOrder.size(); ++i) {
    const std::size_t list_end = list_begin + job.lists[i].size();
    const std::size_t from = std::max(first, list_begin);
    const std::size_t to = std::min(last, list_end);
    if (from < to) {
      if (rotated && !kernels::v_is_rotated(kVisitOrder[i]))
        kernels::hadamard().rotate(partial.o, shape.group, shape.d);
      const std::size_t heads = from * shape.group;
      const kernels::DecodeTask task{.q = job.q,
                                     .group = shape.group,
                                     .d = shape.d,
                                     .scale = shape.scale,
                                     .softcap = shape.softcap,
                                     .skip_below = job.skip_below,
                                     .visible = job.visible,
                                     .format = kVisitOrder[i],
                                     .blocks = job.lists[i].data() + (from - list_begin),
                                     .count = to - from,
                                     .near = l1_data_bytes() >= kNearBytes,
                                     .then = to < last ? first_from(job, i + 1) : then,
                                     .o = partial.o,
                                     .m = partial.m,
                                     .l = partial.l,
                                     .logits = nullptr,
                                     .seen_p = job.seen_p == nullptr ? nullptr : job.seen_p + heads * kBlockTokens,
                                     .seen_m = job.seen_p == nullptr ? nullptr : job.seen_m + heads};
      kernels::attend().decode(task);
      rotated = kernels::v_is_rotated(kVisitOrder[i]);
    }
    list_begin = list_end;
  }
}

// `total` becomes the heads' weights, and `top` 0 where a head saw nothing. A token whose probability is not a number gets none.
// `share`: what the group's probabilities count for. `first`: nothing was added before, and only what blocks hold will be read, by who
// takes no number as 0.
void add_mass(const Job& job, const Shape& shape, float share, float* top, float* total, bool first) noexcept {
  for (std::size_t g = 0; g < shape.group; ++g) {
    if (total[g] == 0.0F) top[g] = 0.0F;
    total[g] = total[g] == 0.0F ? 0.0F : share / total[g];
  }
  const std::uint16_t* p = job.seen_p;
  const float* m = job.seen_m;
  for (const auto& list : job.lists) {
    for (const BlockView& block : list) {
      float sum[kBlockTokens];
      float* const mass = job.mass + block.start;
      const bool straight = first && block.begin == 0 && block.end == kBlockTokens;
      kernels::attend().mass(p, m, shape.group, top, total, straight ? mass : sum);
      p += shape.group * kBlockTokens;
      m += shape.group;
      if (straight) continue;
      for (std::size_t t = block.begin; t < block.end; ++t) {
        const float received = sum[t] > 0.0F ? sum[t] : 0.0F;
        mass[t] = first ? received : mass[t] + received;
      }
    }
  }
}

// Hands a head's mass on.
void fold_mass(const Job& job) noexcept {
  if (job.row->scored == nullptr) return;
  job.row->scored->fold_mass(job.row->layer, job.head, {job.mass, static_cast<std::size_t>(job.row->length)});
}

// Spans in ascending order into job.out. The first span's m and l become the merged maximum and sum, which it returns.
Partial merge_spans(const Job& job, const Shape& shape) noexcept {
  const Partial merged = partial_at(job, shape, 0);
  for (std::size_t g = 0; g < shape.group; ++g) {
    float tops[kBlockTokens];
    std::fill_n(tops, kBlockTokens, -std::numeric_limits<float>::infinity());
    for (std::size_t s = 0; s < job.spans; ++s) tops[s] = partial_at(job, shape, s).m[g];
    const float top = *std::max_element(tops, tops + job.spans);
    const float base = std::isinf(top) ? 0.0F : top;  // of a head that saw nothing
    float weights[kBlockTokens];
    kernels::attend().exp_below(tops, base, weights);
    float total = 0.0F;
    float* const out = job.out + g * shape.d;
    std::fill_n(out, shape.d, 0.0F);
    bool rotated = ends_rotated(job, 0);  // the spans that are come first
    for (std::size_t s = 0; s < job.spans; ++s) {
      const Partial part = partial_at(job, shape, s);
      if (rotated && !ends_rotated(job, s)) {
        kernels::hadamard().rotate(out, 1, shape.d);
        rotated = false;
      }
      if (part.l[g] == 0.0F) continue;
      total += part.l[g] * weights[s];
      for (std::size_t c = 0; c < shape.d; ++c) out[c] += part.o[g * shape.d + c] * weights[s];
    }
    if (rotated) kernels::hadamard().rotate(out, 1, shape.d);
    finish_head(job.q + g * shape.d, out, total, shape.d);
    merged.m[g] = top;
    merged.l[g] = total;
  }
  return merged;
}

void finish(const Job& job, const Shape& shape) noexcept {
  const Partial merged = merge_spans(job, shape);
  if (job.seen_p == nullptr) return;
  // A sliding window leaves blocks out that the scores still have.
  const bool only_folded = job.row->mass == nullptr && shape.local_window < 0;
  if (!only_folded) std::fill_n(job.mass, job.row->length, 0.0F);
  add_mass(job, shape, 1.0F / static_cast<float>(shape.group), merged.m, merged.l, only_folded);
  fold_mass(job);
}

struct Call {
  const Shape& shape;
  std::vector<Job> jobs;
  std::vector<std::pair<std::size_t, std::size_t>> tasks;  // job, span
  std::vector<std::atomic<std::size_t>> unfinished;        // spans, by job
  Parts parts;                                             // of the tasks, one for each thread

  const std::byte* begin_of(std::size_t task) const noexcept {
    if (task == Parts::kNone) return nullptr;
    return span_begin(jobs[tasks[task].first], tasks[task].second);
  }

  // The task that ends a job's last span merges it: no second pass over the pool.
  static void run(void* context, std::size_t own) noexcept {
    auto& call = *static_cast<Call*>(context);
    call.parts.work(own, [&call](std::size_t task, std::size_t then) noexcept {
      const auto [j, span] = call.tasks[task];
      run_span(call.jobs[j], call.shape, span, call.begin_of(then));
      if (call.unfinished[j].fetch_sub(1, std::memory_order_acq_rel) == 1) finish(call.jobs[j], call.shape);
    });
  }
};

// What DecodeTask::seen_p and seen_m of so many blocks and heads take, in whole cache lines of floats, and where they lie.
std::size_t seen_floats(std::size_t heads) noexcept { return heads * kBlockTokens / 2 + (heads + 15) / 16 * 16; }

void place_seen(Job& job, float* at, std::size_t heads) noexcept {
  job.seen_m = at;
  job.seen_p = reinterpret_cast<std::uint16_t*>(at + (heads + 15) / 16 * 16);
}

// Where what is seen and the mass of the jobs that want it lie; returns the floats needed. One after the other, jobs take turns in
// one place, which so stays in the processor's cache.
std::size_t place_masses(std::span<Job> jobs, const Shape& shape, bool in_turn, float* at) noexcept {
  std::size_t taken = 0;
  for (Job& job : jobs) {
    if (!job.row->wants_mass()) continue;
    const std::size_t heads = job.blocks * shape.group;
    const std::size_t seen = seen_floats(heads);
    const std::size_t mass = job.row->mass != nullptr ? 0 : (static_cast<std::size_t>(job.row->length) + 15) / 16 * 16;
    if (at != nullptr) {
      float* const own = at + (in_turn ? 0 : taken);
      place_seen(job, own, heads);
      if (job.row->mass == nullptr) job.mass = own + seen;
    }
    taken = in_turn ? std::max(taken, seen + mass) : taken + seen + mass;
  }
  return taken;
}

// The mean over the sampled queries of one head.
void prefill_mass(const RowPlan& row, const Shape& shape, std::size_t head) {
  static thread_local Floats scratch;  // partial, output and what is seen of one query, and the mass
  Job job = plan_job(row, shape, head, row.tokens - 1);
  const std::size_t width = shape.group * shape.d;
  const std::size_t heads = job.blocks * shape.group;  // no query sees more blocks
  float* at =
      scratch.at_least(partial_floats(shape) + width + seen_floats(heads) + static_cast<std::size_t>(row.length));
  float* const out = at + partial_floats(shape);
  float* const seen = out + width;
  float* const mass = row.mass == nullptr ? seen + seen_floats(heads) : job.mass;
  std::fill_n(mass, row.length, 0.0F);
  const std::size_t queries = (std::min(row.tokens, kMassQueries) + kMassStride - 1) / kMassStride;
  const float share = 1.0F / static_cast<float>(queries * shape.group);
  for (std::size_t i = queries; i-- > 0;) {
    job = plan_job(row, shape, head, row.tokens - 1 - i * kMassStride);
    job.spans = 1;
    job.partials = at;
    job.out = out;
    place_seen(job, seen, heads);
    job.mass = mass;
    job.skip_below = std::numeric_limits<float>::infinity();  // only the probabilities are wanted
    run_span(job, shape, 0, nullptr);
    const Partial merged = merge_spans(job, shape);
    add_mass(job, shape, share, merged.m, merged.l, false);
  }
  fold_mass(job);
}

}  // namespace

void decode_rows(std::span<const RowPlan> rows, const Shape& shape, Executor& executor) {
  std::vector<Job> jobs;
  std::vector<std::pair<std::size_t, std::size_t>> tasks;
  for (const RowPlan& row : rows) {
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      const Job job = plan_job(row, shape, head, 0);
      for (std::size_t span = 0; span < job.spans; ++span) tasks.emplace_back(jobs.size(), span);
      jobs.push_back(job);
    }
  }
  static thread_local Floats partials;
  static thread_local Floats masses;  // kept: fresh pages would cost more than what is computed
  const std::size_t task_count = tasks.size();
  Call call{shape, std::move(jobs), std::move(tasks),
            std::vector<std::atomic<std::size_t>>(rows.size() * shape.kv_heads),
            Parts(task_count, std::min(task_count, executor.concurrency()))};
  float* next_partial = partials.at_least(task_count * partial_floats(shape));
  for (std::size_t j = 0; j < call.jobs.size(); ++j) {
    call.jobs[j].partials = next_partial;
    next_partial += call.jobs[j].spans * partial_floats(shape);
    call.unfinished[j].store(call.jobs[j].spans, std::memory_order_relaxed);
  }
  const bool in_turn = call.parts.size() == 1;
  const std::size_t wanted = place_masses(call.jobs, shape, in_turn, nullptr);
  if (wanted != 0) place_masses(call.jobs, shape, in_turn, masses.at_least(wanted));
  executor.parallel_for(call.parts.size(), &Call::run, &call);
}

void add_prefill_mass(std::span<const RowPlan> rows, const Shape& shape, Executor& executor) {
  struct MassCall {
    const Shape& shape;
    std::span<const RowPlan> rows;
    std::atomic<bool> out_of_memory{false};
  };
  MassCall call{shape, rows};
  const auto task = [](void* context, std::size_t i) noexcept {
    auto& c = *static_cast<MassCall*>(context);
    const RowPlan& row = c.rows[i / c.shape.kv_heads];
    if (!row.wants_mass()) return;
    try {
      prefill_mass(row, c.shape, i % c.shape.kv_heads);
    } catch (const std::bad_alloc&) {
      c.out_of_memory.store(true, std::memory_order_relaxed);
    }
  };
  executor.parallel_for(rows.size() * shape.kv_heads, task, &call);
  if (call.out_of_memory.load()) throw std::bad_alloc();
}

}  // namespace inferos::attention
