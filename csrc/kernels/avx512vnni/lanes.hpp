#pragma once
// Sixteen floats at a time: the lane rules, exp and tanh of attend.hpp. Static, so that no object exports them.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attend_isa.hpp"
#include "kernels/exp_constants.hpp"

namespace inferos::kernels::avx512vnni {

static inline __m512 load_half(const std::byte* p) noexcept {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Four bytes in every lane: the operand of dpbusd that belongs to a query head.
static inline __m512i broadcast4(const void* p) noexcept { return _mm512_broadcastd_epi32(_mm_loadu_si32(p)); }

static inline void prefetch(const void* p, std::uintptr_t ahead) noexcept {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(p) + ahead), _MM_HINT_T1);
}

static inline float reduce16(__m512 v) noexcept {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline float largest16(__m512 v) noexcept {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

static inline __m512 exp_nonpositive(__m512 x) noexcept {
  const __mmask16 kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kExpFloor), _CMP_NLT_UQ);
  const __m512 log2e = _mm512_set1_ps(kLog2e);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_fmadd_ps(x, _mm512_set1_ps(kLog2eLow), _mm512_fmsub_ps(x, log2e, n));
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(kExp2C6), f, _mm512_set1_ps(kExp2C5));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2C4));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2C3));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2C2));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2C1));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0F));
  return _mm512_maskz_scalef_ps(kept, p, n);
}

static inline float exp_nonpositive(float x) noexcept { return _mm512_cvtss_f32(exp_nonpositive(_mm512_set1_ps(x))); }

static inline __m512 soften(__m512 s, float softcap) noexcept {
  if (!(softcap > 0.0F)) return s;
  const __m512 cap = _mm512_set1_ps(softcap);
  const __m512 x = _mm512_div_ps(s, cap);
  const __m512 e = exp_nonpositive(_mm512_mul_ps(_mm512_set1_ps(-2.0F), _mm512_abs_ps(x)));
  const __m512 one = _mm512_set1_ps(1.0F);
  const __m512 t = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
  const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0F));
  return _mm512_mul_ps(cap, _mm512_or_ps(t, sign));
}

static inline __mmask16 lanes_of(TokenRange range, std::size_t vector) noexcept {
  const std::uint64_t below_hi = range.hi >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << range.hi) - 1;
  const std::uint64_t from_lo = range.lo >= 64 ? 0 : ~std::uint64_t{0} << range.lo;
  return static_cast<__mmask16>((below_hi & from_lo) >> (16 * vector));
}

// One block's step of the online softmax: 64 logits in place -> 64 probabilities; m and l updated. Returns alpha.
// Where nothing was ever seen (the new maximum is -inf) alpha and p come out as 0, which leaves the zeros of l and o as they are.
static inline float softmax_step(float* s, TokenRange range, float softcap, float* logits, float& m, float& l) noexcept {
  const __m512 nothing = _mm512_set1_ps(kMinusInfinity);
  __m512 x[4];
  for (std::size_t i = 0; i < 4; ++i) {
    x[i] = _mm512_mask_mov_ps(nothing, lanes_of(range, i), soften(_mm512_loadu_ps(s + 16 * i), softcap));
    if (logits != nullptr) _mm512_storeu_ps(logits + 16 * i, x[i]);
  }
  const float block = largest16(_mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3])));
  const float top = (block > m ? block : m) + 0.0F;
  const float base = top == kMinusInfinity ? 0.0F : top;
  const __m512 subtract = _mm512_set1_ps(base);
  __m512 sum = _mm512_setzero_ps();
  for (std::size_t i = 0; i < 4; ++i) {
    x[i] = exp_nonpositive(_mm512_sub_ps(x[i], subtract));
    _mm512_storeu_ps(s + 16 * i, x[i]);
    sum = _mm512_add_ps(sum, x[i]);
  }
  const float alpha = exp_nonpositive(m - base);
  l = _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(l), _mm_set_ss(alpha), _mm_set_ss(reduce16(sum))));
  m = top;
  return alpha;
}

}  // namespace inferos::kernels::avx512vnni
