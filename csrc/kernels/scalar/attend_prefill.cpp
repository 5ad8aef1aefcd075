// The specification of the prefill tile: blocks to f32 tiles, then attend.hpp for each row in plain loops.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/attend_isa.hpp"
#include "kernels/scalar/packed.hpp"
#include "kernels/scalar/softmax.hpp"

namespace inferos::kernels::scalar {
namespace {

constexpr std::size_t kT = kBlockTokens;

float& k_tile(float* k, std::size_t t, std::size_t c) noexcept { return k[c * kT + t]; }

void expand_f16_token(const BlockView& block, std::size_t d, std::size_t t, float* k, float* v) noexcept {
  const std::byte* values = block.data + block.capacity * d * 2;
  for (std::size_t c = 0; c < d; ++c) {
    k_tile(k, t, c) = half_at(block.data, t / 16 * 16 * d + c * 16 + t % 16);
    v[t * d + c] = half_at(values, t * d + c);
  }
  if (std::none_of(v + t * d, v + (t + 1) * d, [](float x) { return std::isnan(x); })) return;
  std::fill_n(v + t * d, d, 0.0F);
  k_tile(k, t, 0) = kNotANumber;
}

void expand_packed_token(Format format, const BlockView& block, std::size_t d, std::size_t t, float* k,
                         float* v) noexcept {
  const bool wide_k = format != Format::kInt4;
  const bool wide_v = format == Format::kInt8;
  const BlockLayout layout = packed_layout(format, d);
  const std::byte* k_scales = block.data + layout.k_scales;
  const std::byte* v_scales = block.data + layout.v_scales;
  for (std::size_t c = 0; c < d; ++c) {
    const auto k_value = static_cast<float>(k_code(block.data, wide_k, d, t, c));
    const auto v_value = static_cast<float>(v_code(block.data + layout.v_codes, wide_v, t, c));
    k_tile(k, t, c) = std::fma(half_at(k_scales, c), k_value, half_at(k_scales, d + c));
    v[t * d + c] =
        wide_v ? half_at(v_scales, t) * v_value : std::fma(half_at(v_scales, t), v_value, half_at(v_scales, kT + t));
  }
}

void prefill_row(const PrefillTile& tile, std::size_t row) noexcept {
  const TokenRange range = visible_tokens(tile.start, tile.begin, tile.end, tile.visible[row]);
  if (range.lo >= range.hi) return;
  const float* q = tile.q + row * tile.d;
  float s[kT];
  for (std::size_t t = 0; t < kT; ++t) {
    float sum = 0.0F;
    for (std::size_t c = 0; c < tile.d; ++c) sum = std::fma(q[c], tile.k[c * kT + t], sum);
    s[t] = tile.scale * sum;
  }
  mask_logits(s, range, tile.softcap);

  float p[kT];
  const float alpha = softmax_step(s, p, tile.m[row], tile.l[row]);
  float* o = tile.o + row * tile.d;
  for (std::size_t c = 0; c < tile.d; ++c) {
    float sum = o[c] * alpha + 0.0F;  // one zero, not two: a product with p = 0 then changes nothing
    for (std::size_t t = range.lo; t < range.hi; ++t) sum = std::fma(p[t], tile.v[t * tile.d + c], sum);
    o[c] = sum;
  }
}

}  // namespace

void attend_expand(Format format, const BlockView& block, std::size_t d, float* k, float* v) noexcept {
  std::memset(k, 0, kT * d * sizeof(float));
  std::memset(v, 0, kT * d * sizeof(float));
  for (std::size_t t = block.begin; t < block.end; ++t) {
    if (format == Format::kF16)
      expand_f16_token(block, d, t, k, v);
    else
      expand_packed_token(format, block, d, t, k, v);
  }
}

void attend_prefill(const PrefillTile& tile) noexcept {
  for (std::size_t row = 0; row < tile.rows; ++row) prefill_row(tile, row);
}

}  // namespace inferos::kernels::scalar
