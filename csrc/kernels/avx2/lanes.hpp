#pragma once
// Eight floats at a time, two vectors for the sixteen lanes of attend.hpp: its lane rules, exp and tanh. Static, so that no
// object exports them.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attend_isa.hpp"
#include "kernels/exp_constants.hpp"

namespace inferos::kernels::avx2 {

static inline __m256 load_half(const std::byte* p) noexcept {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

static inline __m256i load_bytes(const std::byte* p) noexcept {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

static inline __m256 absolute(__m256 x) noexcept { return _mm256_andnot_ps(_mm256_set1_ps(-0.0F), x); }

static inline float reduce16(__m256 low, __m256 high) noexcept {
  const __m256 eight = _mm256_add_ps(low, high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline float largest8(__m256 v) noexcept {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

static inline std::int32_t sum8(__m256i v) noexcept {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}

static inline __m256 exp_nonpositive(__m256 x) noexcept {
  const __m256 kept = _mm256_cmp_ps(x, _mm256_set1_ps(kExpFloor), _CMP_NLT_UQ);
  const __m256 log2e = _mm256_set1_ps(kLog2e);
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_fmadd_ps(x, _mm256_set1_ps(kLog2eLow), _mm256_fmsub_ps(x, log2e, n));
  __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(kExp2C6), f, _mm256_set1_ps(kExp2C5));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2C4));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2C3));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2C2));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2C1));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0F));
  // n >= -93 and p is near 1: adding to the exponent field is the exact product with 2^n.
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_and_ps(kept, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent)));
}

static inline float exp_nonpositive(float x) noexcept { return _mm256_cvtss_f32(exp_nonpositive(_mm256_set1_ps(x))); }

static inline __m256 soften(__m256 s, float softcap) noexcept {
  if (!(softcap > 0.0F)) return s;
  const __m256 cap = _mm256_set1_ps(softcap);
  const __m256 x = _mm256_div_ps(s, cap);
  const __m256 e = exp_nonpositive(_mm256_mul_ps(_mm256_set1_ps(-2.0F), absolute(x)));
  const __m256 one = _mm256_set1_ps(1.0F);
  const __m256 t = _mm256_div_ps(_mm256_sub_ps(one, e), _mm256_add_ps(one, e));
  const __m256 sign = _mm256_and_ps(x, _mm256_set1_ps(-0.0F));
  return _mm256_mul_ps(cap, _mm256_or_ps(t, sign));
}

// All ones in the lanes whose tokens, 8 * vector and on, lie in the range.
static inline __m256 lanes_of(TokenRange range, std::size_t vector) noexcept {
  const __m256i first = _mm256_set1_epi32(static_cast<std::int32_t>(8 * vector));
  const __m256i t = _mm256_add_epi32(first, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const __m256i below_hi = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<std::int32_t>(range.hi)), t);
  const __m256i below_lo = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<std::int32_t>(range.lo)), t);
  return _mm256_castsi256_ps(_mm256_andnot_si256(below_lo, below_hi));
}

struct Step {
  float alpha;
  float largest;  // probability of the block
};

// One block's step of the online softmax: 64 logits in place -> 64 probabilities; m and l updated.
// Where nothing was ever seen (the new maximum is -inf) alpha and p come out as 0, which leaves the zeros of l and o as they are.
static inline Step softmax_step(float* s, TokenRange range, float softcap, const Shown& shown, float& m,
                                float& l) noexcept {
  const __m256 nothing = _mm256_set1_ps(kMinusInfinity);
  __m256 largest = nothing;
  __m256 x[8];
  for (std::size_t i = 0; i < 8; ++i) {
    x[i] = _mm256_blendv_ps(nothing, soften(_mm256_loadu_ps(s + 8 * i), softcap), lanes_of(range, i));
    if (shown.logits != nullptr) _mm256_storeu_ps(shown.logits + 8 * i, x[i]);
    largest = _mm256_max_ps(largest, x[i]);
  }
  const float block = largest8(largest);
  const float top = (block > m ? block : m) + 0.0F;
  const float base = top == kMinusInfinity ? 0.0F : top;
  const __m256 subtract = _mm256_set1_ps(base);
  __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (std::size_t i = 0; i < 8; ++i) {
    const __m256 p = exp_nonpositive(_mm256_sub_ps(x[i], subtract));
    _mm256_storeu_ps(s + 8 * i, p);
    sum[i % 2] = _mm256_add_ps(sum[i % 2], p);
    if (shown.p == nullptr) continue;
    const __m128i half = _mm256_cvtps_ph(p, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(shown.p + 8 * i), half);
  }
  const float alpha = exp_nonpositive(m - base);
  const float probability = exp_nonpositive(block - base);
  const __m128 total = _mm_set_ss(reduce16(sum[0], sum[1]));
  l = _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(l), _mm_set_ss(alpha), total));
  m = top;
  if (shown.m != nullptr) *shown.m = top;
  return {alpha, probability};
}

}  // namespace inferos::kernels::avx2
