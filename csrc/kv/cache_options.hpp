#pragma once
// What a sequence is opened with, and what follows from it for each layer.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/block.hpp"
#include "kv/layer_store.hpp"
#include "kv/relief.hpp"
#include "kv/review.hpp"

namespace inferos::kv {

// What `auto` goes by.
struct Policy {
  Thresholds thresholds{};
  double gamma = 0.997;  // decay of the averaged attention mass, per token; 0 < gamma < 1
  Eviction eviction = Eviction::kPressure;
  Overflow overflow = Overflow::kError;
  bool external = false;    // scores come from set_scores
  bool check_keys = false;  // formats of kInt4 hold where a layer's keys bear it (key_safety.hpp), kK8V4 elsewhere
  std::vector<Level> max_levels{};  // per layer; empty = L3 for all. L2: no eviction; L1: INT8 at most; L0: FP16
};

struct CacheOptions {
  std::vector<LayerShape> layers;  // 1..4096
  std::vector<Format> formats;     // per layer: what a block becomes when it leaves the window; kF16 = it stays
  // `auto`: a block becomes INT8 when it leaves the window (stays FP16 where l1 < 1); reviews (review.hpp) then pack it narrower
  // by importance, at most to the layer's format. Where l2 is 1 it goes straight there, but during a prompt.
  std::optional<Policy> policy{};
  std::size_t recent_window = 64;     // 16..512 tokens
  std::size_t sink_tokens = 4;        // 0..64
  std::size_t max_tokens = 1u << 30;  // Error{kShape} beyond it
};

void check(const CacheOptions& options);  // Error{kConfig}, Error{kShape}

Level max_level(const CacheOptions& options, std::size_t layer) noexcept;
// What a block of this layer may become at most. `bears_int4`: whether its keys do.
Format narrowest_of(const CacheOptions& options, std::size_t layer, bool bears_int4) noexcept;
// What a block of this layer becomes when it leaves the window in a step of `tokens` tokens.
Format leaving(const CacheOptions& options, std::size_t layer, bool bears_int4, std::int64_t tokens) noexcept;

}  // namespace inferos::kv
