#pragma once
// Attention of one layer over mixed tiers, for one token (decode) or many (prefill), over a cache whose layer has appended the step.
// Where the cache wants the attention mass of the step, it gets it, head by head as they finish: it is still in the processor's cache then.

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/executor.hpp"
#include "kv/sequence_cache.hpp"

namespace inferos::attention {

struct Row {  // one sequence of the batch
  kv::SequenceCache* cache;
  const float* q;      // [tokens][heads][head_dim], rotated
  float* out;          // [tokens][heads][head_dim]
  std::size_t tokens;  // the newest tokens of the sequence; query i sits at visible_length - tokens + i
  // nullptr, or [kv_heads][visible_length]: the probability each token received, mean over the query heads of its kv head;
  // for many tokens the mean over every 4th of the last 64 queries, the newest one included. Positions that are not held get 0.
  float* mass;
};

struct Params {
  std::size_t layer;
  std::size_t heads;  // a multiple of the layer's kv_heads
  float scale;        // 0 = 1/sqrt(head_dim)
  float softcap;      // 0 = none
};

// Decode work is split over (row x kv head x context span), by shapes only, and spans are merged by log-sum-exp in ascending order.
// Prefill work is split over (row x kv head x query tile), and a query yields the same in any tile. So no result depends on the
// number of threads.
// A query that sees no token yields zeros. Throws Error{kShape}.
void run(std::span<const Row> rows, const Params& params, Executor& executor);

}  // namespace inferos::attention
