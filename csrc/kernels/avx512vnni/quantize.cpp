// Quantisers for AVX-512 (F, BW, DQ, VL, F16C). Lanes are always 16 channels, so head_dim has no tail.
//
// What carries the loop, per 16 values, after the extremes are known (figures for Zen 4; Zen 5's 512-bit paths halve the counts):
//   vsubps, vmulps     1 per cycle each     q = (x - minimum) * (1 / scale)
//   vreduceps          1 per cycle          q - rint(q) in one instruction; vrangeps keeps the largest magnitude of four tokens
//   vcvtps2dq          1 per cycle          the code, rounded as reduce rounds
//   vpackusdw/wb       1 per cycle          four tokens of 16 channels become [4 channels][4 tokens] per 128-bit lane, which is
//                                           a K tile's order, so packing is the transpose; vshufi32x4 then gives whole lines
// The float quotient is off by at most 3 roundings, 255 * 3 * 2^-24 < 2^-14. Where one of four vectors comes within 2^-12 of a
// tie, those vectors that do are computed again in double: one in 128 on random data, and never a wrong code.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/block.hpp"
#include "kernels/tables.hpp"

namespace inferos::kernels::avx512vnni {
namespace {

constexpr std::size_t kLanes = 16;
constexpr int kUp = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
constexpr float kNearTie = 0.5F - 0x1p-12F;

alignas(64) constexpr float kNoRow32[kMaxHeadDim] = {};  // stands for the tokens that a short block does not have
alignas(64) constexpr std::uint16_t kNoRow16[kMaxHeadDim] = {};
const float* no_row(const float*) noexcept { return kNoRow32; }
const std::uint16_t* no_row(const std::uint16_t*) noexcept { return kNoRow16; }

__m512 limit() noexcept { return _mm512_set1_ps(65504.0F); }

// NaN -> 0 and the clamp to fp16's range. Only data that has such values pays for it.
__m512 clean(__m512 x) noexcept {
  x = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), x);
  return _mm512_max_ps(_mm512_min_ps(x, limit()), _mm512_sub_ps(_mm512_setzero_ps(), limit()));
}

template <bool kClean>
__m512 load(const float* x) noexcept {
  const __m512 v = _mm512_loadu_ps(x);
  return kClean ? clean(v) : v;
}
template <bool kClean>
__m512 load(const std::uint16_t* x) noexcept {
  const __m512 v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return kClean ? clean(v) : v;
}

void store(float* x, __m512 v) noexcept { _mm512_storeu_ps(x, v); }
void store(std::uint16_t* x, __m512 v) noexcept {  // saturating; NaN passes both min and max as their second operand
  v = _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), limit()), _mm512_min_ps(limit(), v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

struct Range {
  __m512 low, high;
  __mmask16 bad;  // lanes that saw NaN or a value beyond fp16
};

struct Grid {
  __m512 minimum, scale, inverse;
};

__m256 low_half(__m512 x) noexcept { return _mm512_castps512_ps256(x); }
__m256 high_half(__m512 x) noexcept { return _mm512_extractf32x8_ps(x, 1); }

// The smallest fp16 >= (high - base) / steps: the quotient in double, then two directed roundings (fp16 is a subset of f32).
__m256i ceil_f16(__m512 high, __m512 base, double steps) noexcept {
  const __m512d divisor = _mm512_set1_pd(steps);
  const __m512d q0 = _mm512_div_pd(_mm512_sub_pd(_mm512_cvtps_pd(low_half(high)), _mm512_cvtps_pd(low_half(base))), divisor);
  const __m512d q1 = _mm512_div_pd(_mm512_sub_pd(_mm512_cvtps_pd(high_half(high)), _mm512_cvtps_pd(high_half(base))), divisor);
  const __m512 lower = _mm512_castps256_ps512(_mm512_cvt_roundpd_ps(q0, kUp));
  return _mm512_cvtps_ph(_mm512_insertf32x8(lower, _mm512_cvt_roundpd_ps(q1, kUp), 1), kUp);
}

Grid grid_of(__m512 minimum, __m256i scale_bits) noexcept {
  const __m512 scale = _mm512_cvtph_ps(scale_bits);
  const __mmask16 some = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_GT_OQ);
  return {minimum, scale, _mm512_maskz_div_ps(some, _mm512_set1_ps(1.0F), scale)};
}

Grid asymmetric(const Range& range, double steps, std::uint16_t* scales, std::uint16_t* minima) noexcept {
  const __m256i floor = _mm512_cvtps_ph(_mm512_add_ps(range.low, _mm512_setzero_ps()), kDown);  // + 0: no -0
  const __m512 minimum = _mm512_cvtph_ps(floor);
  const __m256i ceil = ceil_f16(range.high, minimum, steps);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(scales), ceil);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(minima), floor);
  return grid_of(minimum, ceil);
}

Grid symmetric(__m512 high, std::uint16_t* scales) noexcept {
  const __m256i ceil = ceil_f16(high, _mm512_setzero_ps(), 127.0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(scales), ceil);
  return grid_of(_mm512_setzero_ps(), ceil);
}

// Codes by the specification's double arithmetic, eight lanes: guess, then compare with the exact boundaries.
__m256i exact8(__m256 value, __m256 base, __m256 step) noexcept {
  const __m512d x = _mm512_cvtps_pd(value);
  const __m512d minimum = _mm512_cvtps_pd(base);
  const __m512d scale = _mm512_cvtps_pd(step);
  const __m512d half = _mm512_mul_pd(scale, _mm512_set1_pd(0.5));
  const __m512d one = _mm512_set1_pd(1.0);
  __m512d code = _mm512_roundscale_pd(_mm512_div_pd(_mm512_sub_pd(x, minimum), scale), _MM_FROUND_TO_NEAREST_INT);
  const __m512d here = _mm512_add_pd(minimum, _mm512_mul_pd(scale, code));
  const __mmask8 above = _mm512_cmp_pd_mask(x, _mm512_add_pd(here, half), _CMP_GT_OQ);
  const __mmask8 below = _mm512_cmp_pd_mask(x, _mm512_sub_pd(here, half), _CMP_LT_OQ);
  code = _mm512_mask_add_pd(code, above, code, one);
  code = _mm512_mask_sub_pd(code, below, code, one);
  return _mm512_maskz_cvtpd_epi32(_mm512_cmp_pd_mask(scale, _mm512_setzero_pd(), _CMP_GT_OQ), code);
}

__m512i exact16(__m512 x, const Grid& g) noexcept {
  const __m256i lower = exact8(low_half(x), low_half(g.minimum), low_half(g.scale));
  const __m256i upper = exact8(high_half(x), high_half(g.minimum), high_half(g.scale));
  return _mm512_inserti32x8(_mm512_castsi256_si512(lower), upper, 1);
}

__m512 quotient(__m512 x, const Grid& g) noexcept { return _mm512_mul_ps(_mm512_sub_ps(x, g.minimum), g.inverse); }

// Codes of one vector; `worst` collects the largest distance of a quotient from its code.
__m512i encode(__m512 x, const Grid& g, __m512& worst) noexcept {
  const __m512 q = quotient(x, g);
  worst = _mm512_range_ps(worst, _mm512_reduce_ps(q, _MM_FROUND_TO_NEAREST_INT), 0x0B);  // larger magnitude, sign cleared
  return _mm512_cvtps_epi32(q);
}

bool near_tie(__m512 distance) noexcept {
  return _mm512_cmp_ps_mask(_mm512_abs_ps(distance), _mm512_set1_ps(kNearTie), _CMP_GE_OQ) != 0;
}

__m512i encode_again(__m512 x, const Grid& g, __m512i code) noexcept {
  return near_tie(_mm512_reduce_ps(quotient(x, g), _MM_FROUND_TO_NEAREST_INT)) ? exact16(x, g) : code;
}

// Its own inverse: 128-bit lane j of vector i <-> lane i of vector j.
void transpose_lanes(__m512i (&v)[4]) noexcept {
  const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44);
  const __m512i b = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(v[0], v[1], 0xEE);
  const __m512i e = _mm512_shuffle_i32x4(v[2], v[3], 0xEE);
  v[0] = _mm512_shuffle_i32x4(a, b, 0x88);
  v[1] = _mm512_shuffle_i32x4(a, b, 0xDD);
  v[2] = _mm512_shuffle_i32x4(c, e, 0x88);
  v[3] = _mm512_shuffle_i32x4(c, e, 0xDD);
}

// ---- K: per channel over the tokens -------------------------------------------------------------------------------

template <bool kClean, class T>
Range range_over_tokens(const T* x, std::size_t tokens, std::size_t d) noexcept {
  __m512 low0 = load<kClean>(x);
  __m512 low1 = low0;
  __m512 high0 = low0;
  __m512 high1 = low0;
  unsigned unordered = _mm512_cmp_ps_mask(low0, low0, _CMP_UNORD_Q);
  std::size_t t = tokens & 1;
  for (; t < tokens; t += 2) {
    const __m512 a = load<kClean>(x + t * d);
    const __m512 b = load<kClean>(x + (t + 1) * d);
    unordered |= _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
    low0 = _mm512_min_ps(low0, a);
    low1 = _mm512_min_ps(low1, b);
    high0 = _mm512_max_ps(high0, a);
    high1 = _mm512_max_ps(high1, b);
  }
  const __m512 low = _mm512_min_ps(low0, low1);
  const __m512 high = _mm512_max_ps(high0, high1);
  unordered |= _mm512_cmp_ps_mask(high, limit(), _CMP_GT_OQ);
  unordered |= _mm512_cmp_ps_mask(low, _mm512_sub_ps(_mm512_setzero_ps(), limit()), _CMP_LT_OQ);
  return {low, high, static_cast<__mmask16>(unordered)};
}

// Four tokens of 16 channels -> 128-bit lane j holds [4 tokens][channels 4j .. 4j+3]. Tokens from `count` on are zero.
template <bool kClean, class T>
__m512i encode_four(const T* x, std::size_t d, std::size_t count, const Grid& g) noexcept {
  __m512i code[4];
  __m512 worst = _mm512_setzero_ps();
  for (std::size_t j = 0; j < 4; ++j) {
    code[j] = j < count ? encode(load<kClean>(x + j * d), g, worst) : _mm512_setzero_si512();
  }
  if (near_tie(worst)) {
    for (std::size_t j = 0; j < 4; ++j) {
      if (j < count) code[j] = encode_again(load<kClean>(x + j * d), g, code[j]);
    }
  }
  return _mm512_packus_epi16(_mm512_packus_epi32(code[0], code[1]), _mm512_packus_epi32(code[2], code[3]));
}

// Sixteen tokens of 16 channels -> four vectors, each [16 tokens][4 channels].
template <bool kClean, class T>
void encode_panel(const T* x, std::size_t d, std::size_t count, const Grid& g, __m512i (&quad)[4]) noexcept {
  for (std::size_t i = 0; i < 4; ++i) {
    if (count >= 4 * i + 4) {
      quad[i] = encode_four<kClean>(x + 4 * i * d, d, 4, g);
    } else if (count > 4 * i) {
      quad[i] = encode_four<kClean>(x + 4 * i * d, d, count - 4 * i, g);
    } else {
      quad[i] = _mm512_setzero_si512();
    }
  }
  transpose_lanes(quad);
}

// Where the codes of tokens t.., channels c.. of a K tile start; kPerRow = channels in one 4-byte word.
template <std::size_t kPerWord>
std::size_t k_offset(std::size_t t, std::size_t c, std::size_t d) noexcept {
  return ((t / 32 * (d / kPerWord) + c / kPerWord) * 32 + t % 32) * 4;
}

template <int kBits, bool kClean, class T>
void encode_column(const T* x, std::size_t tokens, std::size_t d, std::size_t c, const Grid& g, std::uint8_t* codes) noexcept {
  for (std::size_t t = 0; t < kBlockTokens; t += 16) {
    __m512i quad[4];
    encode_panel<kClean>(x + t * d + c, d, tokens > t ? tokens - t : 0, g, quad);
    if constexpr (kBits == 8) {
      std::uint8_t* to = codes + k_offset<4>(t, c, d);
      for (std::size_t j = 0; j < 4; ++j) _mm512_storeu_si512(to + j * 128, quad[j]);
    } else {
      std::uint8_t* to = codes + k_offset<8>(t, c, d);
      for (std::size_t j = 0; j < 2; ++j) {
        _mm512_storeu_si512(to + j * 128, _mm512_or_si512(quad[2 * j], _mm512_slli_epi32(quad[2 * j + 1], 4)));
      }
    }
  }
}

template <int kBits, class T>
void quantize_k(const T* x, std::size_t tokens, std::size_t d, std::uint8_t* codes, std::uint16_t* scales_minima) noexcept {
  constexpr double kSteps = kBits == 8 ? 255.0 : 15.0;
  for (std::size_t c = 0; c < d; c += kLanes) {
    Range range = range_over_tokens<false>(x + c, tokens, d);
    const bool bad = range.bad != 0;
    if (bad) range = range_over_tokens<true>(x + c, tokens, d);
    const Grid grid = asymmetric(range, kSteps, scales_minima + c, scales_minima + d + c);
    if (bad) {
      encode_column<kBits, true>(x, tokens, d, c, grid, codes);
    } else {
      encode_column<kBits, false>(x, tokens, d, c, grid, codes);
    }
  }
}

template <int kBits, class T>
void dequantize_k(const std::uint8_t* codes, const std::uint16_t* scales_minima, std::size_t d, T* x) noexcept {
  // Byte i of word w of every 128-bit lane -> dword i.
  const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi8(0, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, 3, -1, -1, -1));
  const __m512i nibble = _mm512_set1_epi8(15);
  for (std::size_t c = 0; c < d; c += kLanes) {
    const __m512 scale = load<false>(scales_minima + c);
    const __m512 minimum = load<false>(scales_minima + d + c);
    for (std::size_t t = 0; t < kBlockTokens; t += 16) {
      __m512i quad[4];
      if constexpr (kBits == 8) {
        const std::uint8_t* from = codes + k_offset<4>(t, c, d);
        for (std::size_t j = 0; j < 4; ++j) quad[j] = _mm512_loadu_si512(from + j * 128);
      } else {
        const std::uint8_t* from = codes + k_offset<8>(t, c, d);
        for (std::size_t j = 0; j < 2; ++j) {
          const __m512i bytes = _mm512_loadu_si512(from + j * 128);
          quad[2 * j] = _mm512_and_si512(bytes, nibble);
          quad[2 * j + 1] = _mm512_and_si512(_mm512_srli_epi32(bytes, 4), nibble);
        }
      }
      transpose_lanes(quad);
      for (std::size_t i = 0; i < 16; ++i) {
        const __m512i pick = _mm512_mask_add_epi8(first, 0x1111'1111'1111'1111ULL, first, _mm512_set1_epi8(static_cast<char>(i % 4 * 4)));
        const __m512 code = _mm512_cvtepi32_ps(_mm512_shuffle_epi8(quad[i / 4], pick));
        store(x + (t + i) * d + c, _mm512_fmadd_ps(scale, code, minimum));
      }
    }
  }
}

// ---- V: per token over the channels -------------------------------------------------------------------------------

struct TokenGrids {
  alignas(64) float minimum[kBlockTokens];
  alignas(64) float scale[kBlockTokens];
  alignas(64) float inverse[kBlockTokens];

  void put(std::size_t t, const Grid& g) noexcept {
    _mm512_store_ps(minimum + t, g.minimum);
    _mm512_store_ps(scale + t, g.scale);
    _mm512_store_ps(inverse + t, g.inverse);
  }
  Grid of(std::size_t t) const noexcept {
    return {_mm512_set1_ps(minimum[t]), _mm512_set1_ps(scale[t]), _mm512_set1_ps(inverse[t])};
  }
};

// Extremes of one row, in all lanes still apart.
template <bool kClean, class T>
Range range_over_channels(const T* x, std::size_t d) noexcept {
  __m512 low = load<kClean>(x);
  __m512 high = low;
  unsigned bad = _mm512_cmp_ps_mask(low, low, _CMP_UNORD_Q);
  for (std::size_t c = kLanes; c < d; c += kLanes) {
    const __m512 v = load<kClean>(x + c);
    bad |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    low = _mm512_min_ps(low, v);
    high = _mm512_max_ps(high, v);
  }
  return {low, high, static_cast<__mmask16>(bad)};
}

// Extremes of every token; false where a value is NaN or beyond fp16. Tokens that are not there get 0.
template <bool kClean, class T>
bool ranges_of_tokens(const T* x, std::size_t tokens, std::size_t d, float* low, float* high) noexcept {
  unsigned bad = 0;
  for (std::size_t t = 0; t < kBlockTokens; ++t) {
    low[t] = 0.0F;
    high[t] = 0.0F;
    if (t >= tokens) continue;
    const Range range = range_over_channels<kClean>(x + t * d, d);
    low[t] = _mm512_reduce_min_ps(range.low);
    high[t] = _mm512_reduce_max_ps(range.high);
    bad |= range.bad;
    bad |= static_cast<unsigned>(low[t] < -65504.0F) | static_cast<unsigned>(high[t] > 65504.0F);
  }
  return bad == 0;
}

// Codes of kTokens tokens, 16 channels; rows that a short block does not have read zeros on a zero grid.
template <std::size_t kTokens, bool kClean, class T>
void encode_rows(const T* const (&row)[kTokens], std::size_t c, const Grid (&grid)[kTokens], __m512i (&code)[kTokens]) noexcept {
  __m512 worst = _mm512_setzero_ps();
  for (std::size_t j = 0; j < kTokens; ++j) code[j] = encode(load<kClean>(row[j] + c), grid[j], worst);
  if (near_tie(worst)) {
    for (std::size_t j = 0; j < kTokens; ++j) code[j] = encode_again(load<kClean>(row[j] + c), grid[j], code[j]);
  }
}

// Four dwords of codes -> one dword of their low bytes.
__m512i join_bytes(const __m512i (&code)[4]) noexcept {
  constexpr int kSelect = 0xE4;  // ternary logic: mask ? first : second, with the mask as third operand
  __m512i word = _mm512_slli_epi32(code[3], 24);
  word = _mm512_ternarylogic_epi32(word, _mm512_slli_epi32(code[2], 16), _mm512_set1_epi32(static_cast<int>(0xFF000000)), kSelect);
  word = _mm512_ternarylogic_epi32(word, _mm512_slli_epi32(code[1], 8), _mm512_set1_epi32(static_cast<int>(0xFFFF0000)), kSelect);
  return _mm512_ternarylogic_epi32(word, code[0], _mm512_set1_epi32(static_cast<int>(0xFFFFFF00)), kSelect);
}

// Eight dwords of 4-bit codes -> one dword: byte j has code j below and code 4 + j above.
__m512i join_nibbles(const __m512i (&code)[8]) noexcept {
  constexpr int kOr = 0xFE;
  __m512i word = _mm512_or_si512(code[0], _mm512_slli_epi32(code[4], 4));
  word = _mm512_ternarylogic_epi32(word, _mm512_slli_epi32(code[1], 8), _mm512_slli_epi32(code[5], 12), kOr);
  word = _mm512_ternarylogic_epi32(word, _mm512_slli_epi32(code[2], 16), _mm512_slli_epi32(code[6], 20), kOr);
  return _mm512_ternarylogic_epi32(word, _mm512_slli_epi32(code[3], 24), _mm512_slli_epi32(code[7], 28), kOr);
}

template <std::size_t kTokens, bool kClean, class T>
void encode_values(const T* x, std::size_t tokens, std::size_t d, const TokenGrids& grids, void* codes) noexcept {
  constexpr std::size_t kTileBytes = kBlockTokens / kTokens * 64;
  for (std::size_t t = 0; t < kBlockTokens; t += kTokens) {
    const T* row[kTokens];
    Grid grid[kTokens];
    for (std::size_t j = 0; j < kTokens; ++j) {
      row[j] = t + j < tokens ? x + (t + j) * d : no_row(x);
      grid[j] = grids.of(t + j);
    }
    auto* to = static_cast<std::uint8_t*>(codes) + t / kTokens * 64;
    for (std::size_t c = 0; c < d; c += kLanes) {
      __m512i code[kTokens];
      encode_rows<kTokens, kClean>(row, c, grid, code);
      if constexpr (kTokens == 4) {
        _mm512_storeu_si512(to, join_bytes(code));
      } else {
        _mm512_storeu_si512(to, join_nibbles(code));
      }
      to += kTileBytes;
    }
  }
}

template <class T>
void v8(const T* x, std::size_t tokens, std::size_t d, std::int8_t* codes, std::uint16_t* scales) noexcept {
  alignas(64) float low[kBlockTokens];
  alignas(64) float high[kBlockTokens];
  const bool good = ranges_of_tokens<false>(x, tokens, d, low, high);
  if (!good) ranges_of_tokens<true>(x, tokens, d, low, high);
  TokenGrids grids;
  for (std::size_t t = 0; t < kBlockTokens; t += kLanes) {
    const __m512 magnitude = _mm512_range_ps(_mm512_load_ps(low + t), _mm512_load_ps(high + t), 0x0B);
    grids.put(t, symmetric(magnitude, scales + t));
  }
  if (good) {
    encode_values<4, false>(x, tokens, d, grids, codes);
  } else {
    encode_values<4, true>(x, tokens, d, grids, codes);
  }
}

template <class T>
void v4(const T* x, std::size_t tokens, std::size_t d, std::uint8_t* codes, std::uint16_t* scales_minima) noexcept {
  alignas(64) float low[kBlockTokens];
  alignas(64) float high[kBlockTokens];
  const bool good = ranges_of_tokens<false>(x, tokens, d, low, high);
  if (!good) ranges_of_tokens<true>(x, tokens, d, low, high);
  TokenGrids grids;
  for (std::size_t t = 0; t < kBlockTokens; t += kLanes) {
    const Range range{_mm512_load_ps(low + t), _mm512_load_ps(high + t), 0};
    grids.put(t, asymmetric(range, 15.0, scales_minima + t, scales_minima + kBlockTokens + t));
  }
  if (good) {
    encode_values<8, false>(x, tokens, d, grids, codes);
  } else {
    encode_values<8, true>(x, tokens, d, grids, codes);
  }
}

template <class T>
void un_v8(const std::int8_t* codes, const std::uint16_t* scales, std::size_t d, T* x) noexcept {
  for (std::size_t t = 0; t < kBlockTokens; t += 4) {
    __m512 scale[4];
    for (std::size_t j = 0; j < 4; ++j) scale[j] = _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(scales[t + j])));
    const std::int8_t* from = codes + t / 4 * 64;
    for (std::size_t c = 0; c < d; c += kLanes, from += kBlockTokens / 4 * 64) {
      const __m512i word = _mm512_loadu_si512(from);
      for (unsigned j = 0; j < 4; ++j) {
        const __m512i code = _mm512_srai_epi32(_mm512_slli_epi32(word, 24 - 8 * j), 24);
        store(x + (t + j) * d + c, _mm512_mul_ps(scale[j], _mm512_cvtepi32_ps(code)));
      }
    }
  }
}

template <class T>
void un_v4(const std::uint8_t* codes, const std::uint16_t* scales_minima, std::size_t d, T* x) noexcept {
  const __m512i nibble = _mm512_set1_epi32(15);
  for (std::size_t t = 0; t < kBlockTokens; t += 8) {
    __m512 scale[8];
    __m512 minimum[8];
    for (std::size_t j = 0; j < 8; ++j) {
      scale[j] = _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(scales_minima[t + j])));
      minimum[j] = _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(scales_minima[kBlockTokens + t + j])));
    }
    const std::uint8_t* from = codes + t / 8 * 64;
    for (std::size_t c = 0; c < d; c += kLanes, from += kBlockTokens / 8 * 64) {
      const __m512i word = _mm512_loadu_si512(from);
      for (unsigned j = 0; j < 8; ++j) {
        const __m512i code = _mm512_and_si512(_mm512_srli_epi32(word, j % 4 * 8 + j / 4 * 4), nibble);
        store(x + (t + j) * d + c, _mm512_fmadd_ps(scale[j], _mm512_cvtepi32_ps(code), minimum[j]));
      }
    }
  }
}

template <class T>
constexpr QuantizeOf<T> table() noexcept {
  return {quantize_k<8, T>, quantize_k<4, T>, v8<T>, v4<T>, dequantize_k<8, T>, dequantize_k<4, T>, un_v8<T>, un_v4<T>};
}

}  // namespace

const Quantize kQuantize{Isa::kAvx512Vnni, table<float>(), table<std::uint16_t>()};

}  // namespace inferos::kernels::avx512vnni
