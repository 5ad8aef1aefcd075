#include "attention/attention.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "attention/key_check.hpp"
#include "attention/plan.hpp"
#include "core/checked.hpp"

namespace inferos::attention {
namespace {

Shape shape_of(const Row& row, const Params& params) {
  const std::vector<kv::LayerShape>& layers = row.cache->options().layers;
  if (params.layer >= layers.size()) {
    throw Error(ErrorCode::kShape,
                "attention: layer " + std::to_string(params.layer) + " of a cache of " + std::to_string(layers.size()));
  }
  const kv::LayerShape& layer = layers[params.layer];
  if (params.heads == 0 || params.heads % layer.kv_heads != 0) {
    throw Error(ErrorCode::kShape, "attention: " + std::to_string(params.heads) + " heads are no multiple of " +
                                       std::to_string(layer.kv_heads) + " kv heads");
  }
  const float scale = params.scale == 0.0F ? 1.0F / std::sqrt(static_cast<float>(layer.head_dim)) : params.scale;
  return {params.heads,   layer.kv_heads,    params.heads / layer.kv_heads, layer.head_dim, scale,
          params.softcap, layer.local_window};
}

RowPlan plan_of(const Row& row, const Shape& shape, std::size_t layer) {
  const kv::LayerShape& own = row.cache->options().layers.at(layer);
  if (own.kv_heads != shape.kv_heads || own.head_dim != shape.d || own.local_window != shape.local_window) {
    throw Error(ErrorCode::kShape, "attention: the rows' caches differ in the shape of layer " + std::to_string(layer));
  }
  const std::int64_t length = row.cache->visible_length(layer);
  checked_range(static_cast<std::int64_t>(row.tokens), 1, length, "attention: tokens of a row");
  checked_range(length, 1, std::numeric_limits<std::int32_t>::max() - 1, "attention: visible length");
  return {row.cache->wants_mass(layer) ? row.cache : nullptr,
          row.cache->streams(layer),
          row.q,
          row.out,
          row.tokens,
          static_cast<std::int32_t>(length),
          row.mass,
          layer};
}

}  // namespace

std::span<const kernels::BlockView> blocks_within(std::span<const kernels::BlockView> blocks,
                                                  kernels::Visible range) noexcept {
  const auto ends_before = [&](const kernels::BlockView& block) { return block.start + block.end <= range.first; };
  const auto begins_within = [&](const kernels::BlockView& block) { return block.start + block.begin <= range.last; };
  if (blocks.empty()) return blocks;
  if (!ends_before(blocks.front()) && begins_within(blocks.back())) return blocks;  // mostly; a search misses caches
  const auto first = std::partition_point(blocks.begin(), blocks.end(), ends_before);
  const auto last = std::partition_point(first, blocks.end(), begins_within);
  return {first, last};
}

void finish_head(const float* q, float* o, float l, std::size_t d) noexcept {
  constexpr std::uint32_t kExponent = 0x7F800000;
  std::uint32_t odd = 0;  // no early way out, so that compilers take several channels at a time
  for (std::size_t c = 0; c < d; ++c) odd |= (std::bit_cast<std::uint32_t>(q[c]) & kExponent) == kExponent ? 1U : 0U;
  if (odd != 0) {
    std::fill(o, o + d, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const float inverse = l == 0.0F ? 0.0F : 1.0F / l;
  for (std::size_t c = 0; c < d; ++c) o[c] *= inverse;
}

void run(std::span<const Row> rows, const Params& params, Executor& executor) {
  if (rows.empty()) return;
  const Shape shape = shape_of(rows.front(), params);
  std::vector<RowPlan> decode;
  std::vector<RowPlan> prefill;
  for (const Row& row : rows) {
    (row.tokens == 1 ? decode : prefill).push_back(plan_of(row, shape, params.layer));
  }
  if (!decode.empty()) decode_rows(decode, shape, executor);
  if (!prefill.empty()) prefill_rows(prefill, shape, executor);
  const bool mass = std::any_of(prefill.begin(), prefill.end(), [](const RowPlan& row) { return row.wants_mass(); });
  if (mass) add_prefill_mass(prefill, shape, executor);
  for (const std::vector<RowPlan>& plans : {std::cref(decode), std::cref(prefill)}) {
    for (const RowPlan& row : plans) {
      if (row.scored == nullptr) continue;
      row.scored->mass_folded(params.layer);
      if (!row.scored->wants_key_check(params.layer)) continue;
      if (const auto error = int4_error(row, shape, executor)) row.scored->keys_checked(params.layer, *error);
    }
  }
}

}  // namespace inferos::attention
