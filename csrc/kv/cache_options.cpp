#include "kv/cache_options.hpp"

#include <algorithm>
#include <limits>
#include <string>

#include "core/error.hpp"

namespace inferos::kv {
namespace {

constexpr std::int64_t kMaxTokens =
    std::numeric_limits<std::int32_t>::max() - 64;  // positions, and the end of a block, fit int32

std::string text(std::int64_t value) { return std::to_string(value); }
std::string text(std::size_t value) { return std::to_string(value); }

void check(const Policy& policy, std::size_t layers) {
  const auto& [l1, l2, l3] = policy.thresholds;
  if (!(0.0 <= l3 && l3 <= l2 && l2 <= l1 && l1 <= 1.0) || !(0.0 < policy.gamma && policy.gamma < 1.0)) {
    throw Error(ErrorCode::kConfig, "SequenceCache: thresholds l1 " + std::to_string(l1) + ", l2 " +
                                        std::to_string(l2) + ", l3 " + std::to_string(l3) + ", gamma " +
                                        std::to_string(policy.gamma) +
                                        ": wanted 0 <= l3 <= l2 <= l1 <= 1, 0 < gamma < 1");
  }
  if (!policy.max_levels.empty() && policy.max_levels.size() != layers) {
    throw Error(ErrorCode::kShape,
                "SequenceCache: " + text(policy.max_levels.size()) + " max_levels for " + text(layers) + " layers");
  }
}

}  // namespace

void check(const CacheOptions& options) {
  const auto config = [](const std::string& name, std::size_t value, std::size_t low, std::size_t high) {
    if (value < low || value > high) {
      throw Error(ErrorCode::kConfig,
                  "SequenceCache: " + name + " " + text(value) + " is not within " + text(low) + ".." + text(high));
    }
  };
  config("layers", options.layers.size(), 1, 4096);
  config("recent_window", options.recent_window, 16, 512);
  config("sink_tokens", options.sink_tokens, 0, 64);
  config("max_tokens", options.max_tokens, 1, static_cast<std::size_t>(kMaxTokens));
  if (options.formats.size() != options.layers.size()) {
    throw Error(ErrorCode::kShape, "SequenceCache: " + text(options.formats.size()) + " formats for " +
                                       text(options.layers.size()) + " layers");
  }
  if (options.policy) check(*options.policy, options.layers.size());
  for (std::size_t i = 0; i < options.layers.size(); ++i) {
    const LayerShape& layer = options.layers[i];
    const std::string where = "layer " + text(i) + ": ";
    config(where + "kv_heads", layer.kv_heads, 1, 1024);
    if (!kernels::valid_head_dim(layer.head_dim)) {
      throw Error(ErrorCode::kConfig, "SequenceCache: " + where + "head_dim " + text(layer.head_dim) +
                                          " is not a multiple of 16 within 16..256");
    }
    if (layer.local_window < -1) {
      throw Error(ErrorCode::kConfig, "SequenceCache: " + where + "local_window " +
                                          text(std::int64_t{layer.local_window}) + " is neither -1 nor 0 or more");
    }
    if (options.formats[i] > Format::kInt4) {
      throw Error(ErrorCode::kConfig, "SequenceCache: " + where + "unknown format");
    }
  }
}

Level max_level(const CacheOptions& options, std::size_t layer) noexcept {
  const std::optional<Policy>& policy = options.policy;
  return policy && !policy->max_levels.empty() ? policy->max_levels[layer] : Level::kL3;
}

Format narrowest_of(const CacheOptions& options, std::size_t layer, bool bears_int4) noexcept {
  if (!options.policy) return options.formats[layer];
  const bool spared = options.policy->check_keys && !bears_int4;
  if (max_level(options, layer) >= Level::kL2) {
    return spared ? std::min(Format::kK8V4, options.formats[layer]) : options.formats[layer];
  }
  return max_level(options, layer) == Level::kL1 ? std::min(Format::kInt8, options.formats[layer]) : Format::kF16;
}

Format leaving(const CacheOptions& options, std::size_t layer, bool bears_int4, std::int64_t tokens) noexcept {
  const Format most = narrowest_of(options, layer, bears_int4);
  if (!options.policy || (options.policy->thresholds.l2 >= 1.0 && tokens == 1)) return most;
  return options.policy->thresholds.l1 >= 1.0 ? std::min(Format::kInt8, most) : Format::kF16;
}

}  // namespace inferos::kv
