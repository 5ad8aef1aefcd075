#pragma once
// The part of attend.hpp that decode and prefill share: lanes, and one block's step of the online softmax.

#include <cmath>
#include <cstddef>

#include "kernels/attend_isa.hpp"
#include "kernels/scalar/exp.hpp"

namespace inferos::kernels::scalar {

inline constexpr std::size_t kLanes = 16;

inline float reduce16(float (&lanes)[kLanes]) noexcept {
  for (std::size_t half = kLanes / 2; half != 0; half /= 2) {
    for (std::size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

inline float soften(float s, float softcap) noexcept { return softcap > 0.0F ? softcap * tanh(s / softcap) : s; }

// Cuts s[64] to the range (-inf elsewhere) after soft-capping it.
inline void mask_logits(float (&s)[kBlockTokens], TokenRange range, float softcap) noexcept {
  for (std::size_t t = 0; t < kBlockTokens; ++t) {
    s[t] = t >= range.lo && t < range.hi ? soften(s[t], softcap) : kMinusInfinity;
  }
}

// Masked logits s -> probabilities p relative to the new maximum; m and l updated. Returns alpha, which o is to be multiplied by.
inline float softmax_step(const float (&s)[kBlockTokens], float (&p)[kBlockTokens], float& m, float& l) noexcept {
  float top = m;
  for (const float x : s) top = x > top ? x : top;
  top += 0.0F;  // one zero, not two
  const float base = top == kMinusInfinity ? 0.0F : top;
  const float alpha = exp_nonpositive(m - base);
  float lanes[kLanes] = {};
  for (std::size_t t = 0; t < kBlockTokens; ++t) {
    p[t] = exp_nonpositive(s[t] - base);
    lanes[t % kLanes] += p[t];
  }
  m = top;
  l = std::fma(l, alpha, reduce16(lanes));
  return alpha;
}

// The largest probability of a step that left the maximum at `top`.
inline float largest_of(const float (&s)[kBlockTokens], float top) noexcept {
  float largest = kMinusInfinity;
  for (const float x : s) largest = x > largest ? x : largest;
  return exp_nonpositive(largest - (top == kMinusInfinity ? 0.0F : top));
}

}  // namespace inferos::kernels::scalar
