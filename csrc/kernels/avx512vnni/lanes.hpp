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

// sum + 4 products of u8 and s8 in each of 16 lanes.
static inline __m512i dot4(__m512i sum, __m512i u8, __m512i s8) noexcept {
#if defined(__GNUC__)
  // g++ 12 copies every accumulator twice a turn around its own intrinsic, and spills some: half the speed.
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u8), "v"(s8));
  return sum;
#else
  return _mm512_dpbusd_epi32(sum, u8, s8);
#endif
}

namespace {  // a member function cannot be kept out of the symbol table by static

struct Sum {
  static inline __m256 of(__m256 a, __m256 b) noexcept { return _mm256_add_ps(a, b); }
};

struct Largest {
  static inline __m256 of(__m256 a, __m256 b) noexcept { return _mm256_max_ps(a, b); }
};

}  // namespace

// Reduces the 16 lanes of each of N <= 4 vectors, in the order of reduce16: result i in lane i. One at a time, the latency of
// each head's reduction would stand in its way alone; together they cost little more than one.
template <class Op, std::size_t N>
static inline __m128 across(const __m512 (&v)[N]) noexcept {
  __m256 eight[4];
  for (std::size_t i = 0; i < 4; ++i) {
    const __m512 x = v[i < N ? i : 0];
    eight[i] = Op::of(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  }
  const __m256 ab =
      Op::of(_mm256_permute2f128_ps(eight[0], eight[1], 0x20), _mm256_permute2f128_ps(eight[0], eight[1], 0x31));
  const __m256 cd =
      Op::of(_mm256_permute2f128_ps(eight[2], eight[3], 0x20), _mm256_permute2f128_ps(eight[2], eight[3], 0x31));
  const __m256 two = Op::of(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
  const __m256 one = Op::of(two, _mm256_movehdup_ps(two));  // a . c . | b . d .
  return _mm_blend_ps(_mm256_castps256_ps128(one), _mm_moveldup_ps(_mm256_extractf128_ps(one, 1)), 0xA);
}

// levels / largest, 0 where the largest counts as zero.
static inline __m128 step_up(__m128 largest, float levels) noexcept {
  const __m128 small = _mm_cmplt_ps(largest, _mm_set1_ps(kSmallestMaximum));
  return _mm_andnot_ps(small, _mm_div_ps(_mm_set1_ps(levels), largest));
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

// One block's step of the online softmax for N <= 4 heads or rows: 64 logits each in place -> 64 probabilities; m[N] and l[N]
// updated, alpha[N] written. A row that sees nothing keeps m and l; where it never saw anything (the new maximum is -inf)
// alpha and p come out as 0, which leaves the zeros of l and o as they are. Returns the largest probability of each row.
template <std::size_t N>
static inline __m128 softmax_step(float (*s)[kBlockTokens], const TokenRange* range, float softcap, Shown shown,
                                  float* m, float* l, float* alpha) noexcept {
  constexpr __mmask8 kUsed = (1U << N) - 1;
  const __m512 nothing = _mm512_set1_ps(kMinusInfinity);
  __m512 largest[N];
  for (std::size_t g = 0; g < N; ++g) {
    __m512 x[4];
    for (std::size_t i = 0; i < 4; ++i) {
      x[i] = _mm512_mask_mov_ps(nothing, lanes_of(range[g], i), soften(_mm512_loadu_ps(s[g] + 16 * i), softcap));
      _mm512_storeu_ps(s[g] + 16 * i, x[i]);
      if (shown.logits != nullptr) _mm512_storeu_ps(shown.logits + g * kBlockTokens + 16 * i, x[i]);
    }
    largest[g] = _mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3]));
  }
  const __m128 old = _mm_maskz_loadu_ps(kUsed, m);
  const __m128 own = across<Largest>(largest);
  const __m128 top = _mm_add_ps(_mm_max_ps(own, old), _mm_setzero_ps());
  const __m128 base = _mm_andnot_ps(_mm_cmpeq_ps(top, _mm_set1_ps(kMinusInfinity)), top);
  alignas(16) float subtract[4];
  _mm_store_ps(subtract, base);
  __m512 sum[N];
  for (std::size_t g = 0; g < N; ++g) {
    sum[g] = _mm512_setzero_ps();
    for (std::size_t i = 0; i < 4; ++i) {
      const __m512 p = exp_nonpositive(_mm512_sub_ps(_mm512_loadu_ps(s[g] + 16 * i), _mm512_set1_ps(subtract[g])));
      _mm512_storeu_ps(s[g] + 16 * i, p);
      sum[g] = _mm512_add_ps(sum[g], p);
      if (shown.p == nullptr) continue;
      const __m256i half = _mm512_cvtps_ph(p, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(shown.p + g * kBlockTokens + 16 * i), half);
    }
  }
  const __m256 below = _mm256_set_m128(_mm_sub_ps(own, base), _mm_sub_ps(old, base));
  const __m512 factors = exp_nonpositive(_mm512_zextps256_ps512(below));
  const __m128 shrink = _mm512_castps512_ps128(factors);
  _mm_mask_storeu_ps(alpha, kUsed, shrink);
  _mm_mask_storeu_ps(l, kUsed, _mm_fmadd_ps(_mm_maskz_loadu_ps(kUsed, l), shrink, across<Sum>(sum)));
  _mm_mask_storeu_ps(m, kUsed, top);
  if (shown.m != nullptr) _mm_mask_storeu_ps(shown.m, kUsed, top);
  return _mm512_extractf32x4_ps(factors, 1);
}

}  // namespace inferos::kernels::avx512vnni
