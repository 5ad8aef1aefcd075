// The specification of decode attention: attend.hpp in plain loops.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/fp16.hpp"
#include "kernels/attend_isa.hpp"
#include "kernels/scalar/packed.hpp"
#include "kernels/scalar/softmax.hpp"

namespace inferos::kernels::scalar {
namespace {

constexpr std::size_t kT = kBlockTokens;

// rint(x), or 0 where x is no number that the levels can hold (only non-finite input leads there).
std::int32_t to_code(float x, float levels) noexcept {
  return std::fabs(x) <= levels + 1.0F ? static_cast<std::int32_t>(std::nearbyint(x)) : 0;
}

void f16_logits(const DecodeTask& task, const BlockView& block, const float* q, TokenRange range,
                float (&s)[kT]) noexcept {
  for (std::size_t t = range.lo; t < range.hi; ++t) {
    float sum = 0.0F;
    for (std::size_t c = 0; c < task.d; ++c) {
      sum = std::fma(q[c], half_at(block.data, t / 16 * 16 * task.d + c * 16 + t % 16), sum);
    }
    s[t] = task.scale * sum;
  }
}

void packed_logits(const DecodeTask& task, const BlockView& block, const float* q, float (&s)[kT]) noexcept {
  const bool wide = task.format != Format::kInt4;
  const BlockLayout layout = packed_layout(task.format, task.d);
  const std::byte* scales = block.data + layout.k_scales;
  const float levels = wide ? kWideLevels : kNarrowLevels;
  float w[kMaxHeadDim];
  float lanes[kLanes] = {};
  float a = 0.0F;
  for (std::size_t c = 0; c < task.d; ++c) {
    w[c] = q[c] * half_at(scales, c);
    lanes[c % kLanes] = std::fma(q[c], half_at(scales, task.d + c), lanes[c % kLanes]);
    a = std::fabs(w[c]) > a ? std::fabs(w[c]) : a;
  }
  const float bias = reduce16(lanes);
  std::int32_t weights[kMaxHeadDim];
  for (std::size_t c = 0; c < task.d; ++c) weights[c] = a < kSmallestMaximum ? 0 : to_code(w[c] * (levels / a), levels);
  const float factor = (a / levels) * task.scale;
  for (std::size_t t = 0; t < kT; ++t) {
    std::int32_t sum = 0;
    for (std::size_t c = 0; c < task.d; ++c) sum += weights[c] * k_code(block.data, wide, task.d, t, c);
    s[t] = std::fma(static_cast<float>(sum), factor, bias * task.scale);
  }
}

void f16_values(const DecodeTask& task, const BlockView& block, const float (&p)[kT], TokenRange range, float alpha,
                float* o) noexcept {
  const std::byte* v = block.data + block.capacity * task.d * 2;
  for (std::size_t c = 0; c < task.d; ++c) {
    float sum = o[c] * alpha;
    for (std::size_t t = range.lo; t < range.hi; ++t) {
      sum = std::fma(p[t], half_at(v, t * task.d + c), sum);
    }
    o[c] = sum;
  }
}

// Weights of tokens [first, first + count), and what one of them is worth.
float weigh(const float (&r)[kT], std::size_t first, std::size_t count, std::int32_t (&weights)[kT]) noexcept {
  float b = 0.0F;
  for (std::size_t t = first; t < first + count; ++t) b = r[t] > b ? r[t] : b;
  for (std::size_t t = first; t < first + count; ++t) {
    weights[t] = b < kSmallestMaximum ? 0 : to_code(r[t] * (kWeightLevels / b), kWeightLevels);
  }
  return b / kWeightLevels;
}

void v8_values(const DecodeTask& task, const BlockView& block, const float (&p)[kT], float alpha, float* o) noexcept {
  const BlockLayout layout = packed_layout(task.format, task.d);
  const std::byte* codes = block.data + layout.v_codes;
  float r[kT];
  for (std::size_t t = 0; t < kT; ++t) r[t] = p[t] * half_at(block.data + layout.v_scales, t);
  for (std::size_t c = 0; c < task.d; ++c) o[c] *= alpha;
  std::int32_t weights[kT];
  for (std::size_t first = 0; first < kT; first += kLanes) {
    const float unit = weigh(r, first, kLanes, weights);
    for (std::size_t c = 0; c < task.d; ++c) {
      std::int32_t sum = 0;
      for (std::size_t t = first; t < first + kLanes; ++t) sum += weights[t] * v_code(codes, true, t, c);
      o[c] = std::fma(static_cast<float>(sum), unit, o[c]);
    }
  }
}

void v4_values(const DecodeTask& task, const BlockView& block, const float (&p)[kT], float alpha, float* o) noexcept {
  const BlockLayout layout = packed_layout(task.format, task.d);
  const std::byte* codes = block.data + layout.v_codes;
  const std::byte* scales = block.data + layout.v_scales;
  float r[kT];
  float lanes[kLanes] = {};
  for (std::size_t t = 0; t < kT; ++t) {
    r[t] = p[t] * half_at(scales, t);
    const float centre = std::fma(half_at(scales, t), static_cast<float>(kNibbleCentre), half_at(scales, kT + t));
    lanes[t % kLanes] = std::fma(p[t], centre, lanes[t % kLanes]);
  }
  std::int32_t weights[kT];
  const float unit = weigh(r, 0, kT, weights);
  const float bias = reduce16(lanes);
  for (std::size_t c = 0; c < task.d; ++c) {
    std::int32_t sum = 0;
    for (std::size_t t = 0; t < kT; ++t) sum += weights[t] * (v_code(codes, false, t, c) - kNibbleCentre);
    o[c] = std::fma(static_cast<float>(sum), unit, o[c] * alpha) + bias;
  }
}

void decode_block(const DecodeTask& task, const BlockView& block, std::size_t g, const Shown& shown) noexcept {
  const TokenRange range = visible_tokens(block.start, block.begin, block.end, task.visible);
  if (range.lo >= range.hi) return show_nothing(shown, 1);
  const bool f16 = task.format == Format::kF16;
  const float* q = task.q + g * task.d;
  float s[kT] = {};
  if (f16)
    f16_logits(task, block, q, range, s);
  else
    packed_logits(task, block, q, s);
  mask_logits(s, range, task.softcap);
  if (shown.logits != nullptr) std::memcpy(shown.logits, s, sizeof s);

  float p[kT];
  const float alpha = softmax_step(s, p, task.m[g], task.l[g]);
  if (shown.p != nullptr) std::transform(p, p + kT, shown.p, f32_to_f16);
  if (shown.m != nullptr) *shown.m = task.m[g];
  if (largest_of(s, task.m[g]) < task.skip_below) return;
  float* o = task.o + g * task.d;
  if (f16)
    f16_values(task, block, p, range, alpha, o);
  else if (task.format == Format::kInt8)
    v8_values(task, block, p, alpha, o);
  else
    v4_values(task, block, p, alpha, o);
}

}  // namespace

void attend_decode(const DecodeTask& task) noexcept {
  for (std::size_t i = 0; i < task.count; ++i) {
    for (std::size_t g = 0; g < task.group; ++g) {
      decode_block(task, task.blocks[i], g, shown_from(task, i * task.group + g));
    }
  }
}

void attend_mass(const std::uint16_t* p, const float* m, std::size_t group, const float* top, const float* weight,
                 float* sum) noexcept {
  std::fill_n(sum, kT, 0.0F);
  for (std::size_t g = 0; g < group; ++g) {
    const float factor = weight[g] * exp_nonpositive(m[g] - top[g]);
    for (std::size_t t = 0; t < kT; ++t) sum[t] = std::fma(factor, f16_to_f32(p[g * kT + t]), sum[t]);
  }
}

void attend_exp_below(const float* x, float top, float* out) noexcept {
  for (std::size_t i = 0; i < kT; ++i) out[i] = exp_nonpositive(x[i] - top);
}

}  // namespace inferos::kernels::scalar
