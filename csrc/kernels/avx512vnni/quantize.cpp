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
using Vector = __m512;
using Words = __m512i;
constexpr int kUp = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
constexpr int kLargerMagnitude = 0x0B;  // of vrangeps: the larger magnitude, sign cleared
constexpr float kNearTie = 0.5F - 0x1p-12F;

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

Vector load_floats(const float* x) noexcept { return _mm512_load_ps(x); }
void store_floats(float* x, Vector v) noexcept { _mm512_store_ps(x, v); }
Vector all(float x) noexcept { return _mm512_set1_ps(x); }
Words no_words() noexcept { return _mm512_setzero_si512(); }
void store_words(void* to, Words v) noexcept { _mm512_storeu_si512(to, v); }

struct Grid {
  __m512 minimum, scale, inverse;
};

bool beyond_f16(__m512 low, __m512 high) noexcept {
  return _mm512_cmp_ps_mask(high, limit(), _CMP_GT_OQ) != 0 ||
         _mm512_cmp_ps_mask(low, _mm512_sub_ps(_mm512_setzero_ps(), limit()), _CMP_LT_OQ) != 0;
}

__m256 low_half(__m512 x) noexcept { return _mm512_castps512_ps256(x); }
__m256 high_half(__m512 x) noexcept { return _mm512_extractf32x8_ps(x, 1); }

// The smallest fp16 >= (high - base) / steps: the quotient in double, then two directed roundings (fp16 is a subset of f32).
__m256i ceil_f16(__m512 high, __m512 base, double steps) noexcept {
  const __m512d divisor = _mm512_set1_pd(steps);
  const __m512d q0 =
      _mm512_div_pd(_mm512_sub_pd(_mm512_cvtps_pd(low_half(high)), _mm512_cvtps_pd(low_half(base))), divisor);
  const __m512d q1 =
      _mm512_div_pd(_mm512_sub_pd(_mm512_cvtps_pd(high_half(high)), _mm512_cvtps_pd(high_half(base))), divisor);
  const __m512 lower = _mm512_castps256_ps512(_mm512_cvt_roundpd_ps(q0, kUp));
  return _mm512_cvtps_ph(_mm512_insertf32x8(lower, _mm512_cvt_roundpd_ps(q1, kUp), 1), kUp);
}

Grid grid_of(__m512 minimum, __m256i scale_bits) noexcept {
  const __m512 scale = _mm512_cvtph_ps(scale_bits);
  const __mmask16 some = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_GT_OQ);
  return {minimum, scale, _mm512_maskz_div_ps(some, _mm512_set1_ps(1.0F), scale)};
}

Grid asymmetric(__m512 low, __m512 high, double steps, std::uint16_t* scales, std::uint16_t* minima) noexcept {
  const __m512 zero = _mm512_setzero_ps();  // x + 0 turns -0 into +0
  const __m256i floor = _mm512_cvtps_ph(_mm512_add_ps(low, zero), kDown);
  const __m512 minimum = _mm512_cvtph_ps(floor);
  const __m256i ceil = ceil_f16(_mm512_add_ps(high, zero), minimum, steps);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(scales), ceil);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(minima), floor);
  return grid_of(minimum, ceil);
}

Grid symmetric(__m512 low, __m512 high, std::uint16_t* scales) noexcept {
  const __m256i ceil = ceil_f16(_mm512_range_ps(low, high, kLargerMagnitude), _mm512_setzero_ps(), 127.0);
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

template <bool kSymmetric>
__m512 quotient(__m512 x, const Grid& g) noexcept {
  return _mm512_mul_ps(kSymmetric ? x : _mm512_sub_ps(x, g.minimum), g.inverse);
}

// Codes of one vector; `worst` collects the largest distance of a quotient from its code.
template <bool kSymmetric>
__m512i encode(__m512 x, const Grid& g, __m512& worst) noexcept {
  const __m512 q = quotient<kSymmetric>(x, g);
  worst = _mm512_range_ps(worst, _mm512_reduce_ps(q, _MM_FROUND_TO_NEAREST_INT), kLargerMagnitude);
  return _mm512_cvtps_epi32(q);
}

bool near_tie(__m512 distance) noexcept {
  return _mm512_cmp_ps_mask(_mm512_abs_ps(distance), _mm512_set1_ps(kNearTie), _CMP_GE_OQ) != 0;
}

template <bool kSymmetric>
__m512i encode_again(__m512 x, const Grid& g, __m512i code) noexcept {
  return near_tie(_mm512_reduce_ps(quotient<kSymmetric>(x, g), _MM_FROUND_TO_NEAREST_INT)) ? exact16(x, g) : code;
}

// Four vectors of codes up to 255 -> per 128-bit lane [4 vectors][4 codes].
Words pack_bytes(const Words (&code)[4]) noexcept {
  return _mm512_packus_epi16(_mm512_packus_epi32(code[0], code[1]), _mm512_packus_epi32(code[2], code[3]));
}

#include "kernels/quantize_parts.hpp"

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

// Extremes of kColumns * 16 channels, in registers while the rows stream by; false where a value is NaN or beyond fp16.
template <bool kClean, std::size_t kColumns, class T>
bool extremes_of_columns(const T* x, std::size_t tokens, std::size_t d, float* to_low, float* to_high) noexcept {
  __m512 low[kColumns];
  __m512 high[kColumns];
  for (std::size_t i = 0; i < kColumns; ++i) low[i] = high[i] = load<kClean>(x + i * kLanes);
  // A masked comparison that finds a NaN in either operand, one chain for two columns.
  __mmask16 ordered[(kColumns + 1) / 2];
  for (__mmask16& mask : ordered) mask = 0xFFFF;
  for (std::size_t t = 0; t < tokens; ++t) {
    __m512 v[kColumns];
    for (std::size_t i = 0; i < kColumns; ++i) {
      v[i] = load<kClean>(x + t * d + i * kLanes);
      low[i] = _mm512_min_ps(low[i], v[i]);
      high[i] = _mm512_max_ps(high[i], v[i]);
    }
    for (std::size_t i = 0; i < kColumns; i += 2) {
      ordered[i / 2] = _mm512_mask_cmp_ps_mask(ordered[i / 2], v[i], v[i + 1 < kColumns ? i + 1 : i], _CMP_ORD_Q);
    }
  }
  bool good = true;
  for (const __mmask16 mask : ordered) good &= mask == 0xFFFF;
  for (std::size_t i = 0; i < kColumns; ++i) {
    _mm512_store_ps(to_low + i * kLanes, low[i]);
    _mm512_store_ps(to_high + i * kLanes, high[i]);
    good &= !beyond_f16(low[i], high[i]);
  }
  return good;
}

template <bool kClean, class T>
bool extremes_of_channels(const T* x, std::size_t tokens, std::size_t d, Extremes& e) noexcept {
  bool good = true;
  for (std::size_t c = 0; c < d;) {
    const std::size_t left = (d - c) / kLanes;
    if (left >= 8) {
      good &= extremes_of_columns<kClean, 8>(x + c, tokens, d, e.low + c, e.high + c);
      c += 8 * kLanes;
    } else if (left >= 4) {
      good &= extremes_of_columns<kClean, 4>(x + c, tokens, d, e.low + c, e.high + c);
      c += 4 * kLanes;
    } else {
      good &= extremes_of_columns<kClean, 1>(x + c, tokens, d, e.low + c, e.high + c);
      c += kLanes;
    }
  }
  return good;
}

// Sixteen tokens of 16 channels -> four vectors, each [16 tokens][4 channels].
template <bool kClean, class T>
[[gnu::always_inline]] inline void encode_panel(const T* x, std::size_t d, std::size_t count, const Grid& g,
                                                __m512i (&quad)[4]) noexcept {
  if (count >= 16) {
    for (std::size_t i = 0; i < 4; ++i) quad[i] = encode_four<kClean>(x + 4 * i * d, d, 4, g);
  } else {
    for (std::size_t i = 0; i < 4; ++i) {
      const std::size_t here = count > 4 * i ? count - 4 * i : 0;
      quad[i] = encode_four<kClean>(x + 4 * i * d, d, here < 4 ? here : 4, g);
    }
  }
  transpose_lanes(quad);
}

template <int kBits, bool kClean, class T>
void encode_keys(const T* x, std::size_t tokens, std::size_t d, const Grids& grids, std::uint8_t* codes) noexcept {
  for (std::size_t t = 0; t < kBlockTokens; t += 16) {
    const std::size_t count = tokens > t ? tokens - t : 0;
    for (std::size_t c = 0; c < d; c += kLanes) {
      __m512i quad[4];
      encode_panel<kClean>(x + t * d + c, d, count, grids.vector(c), quad);
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
}

template <int kBits, class T>
void dequantize_k(const std::uint8_t* codes, const std::uint16_t* scales_minima, std::size_t d, T* x) noexcept {
  // Byte i of word w of every 128-bit lane -> dword i.
  const __m512i first =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, 3, -1, -1, -1));
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
        const __m512i pick = _mm512_mask_add_epi8(first, 0x1111'1111'1111'1111ULL, first,
                                                  _mm512_set1_epi8(static_cast<char>(i % 4 * 4)));
        const __m512 code = _mm512_cvtepi32_ps(_mm512_shuffle_epi8(quad[i / 4], pick));
        store(x + (t + i) * d + c, _mm512_fmadd_ps(scale, code, minimum));
      }
    }
  }
}

// ---- V: per token over the channels -------------------------------------------------------------------------------

struct Smaller {
  __m512 operator()(__m512 a, __m512 b) const noexcept { return _mm512_min_ps(a, b); }
};
struct Larger {
  __m512 operator()(__m512 a, __m512 b) const noexcept { return _mm512_max_ps(a, b); }
};

// Sixteen vectors -> one whose lane t is vector t, reduced: the first steps of a transpose with a reduction after each.
template <class Pick>
__m512 reduce_each(const __m512 (&v)[16], Pick pick) noexcept {
  __m512 four[4];  // per 128-bit lane: what is left of vectors 4i .. 4i+3
  for (std::size_t i = 0; i < 4; ++i) {
    const __m512* w = v + 4 * i;
    const __m512 a = pick(_mm512_unpacklo_ps(w[0], w[1]), _mm512_unpackhi_ps(w[0], w[1]));
    const __m512 b = pick(_mm512_unpacklo_ps(w[2], w[3]), _mm512_unpackhi_ps(w[2], w[3]));
    four[i] = pick(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
  }
  const __m512 a = pick(_mm512_shuffle_f32x4(four[0], four[1], 0x44), _mm512_shuffle_f32x4(four[0], four[1], 0xEE));
  const __m512 b = pick(_mm512_shuffle_f32x4(four[2], four[3], 0x44), _mm512_shuffle_f32x4(four[2], four[3], 0xEE));
  return pick(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}

// Extremes of every token; false where a value is NaN or beyond fp16. Tokens that are not there get 0.
template <bool kClean, class T>
bool extremes_of_tokens(const T* x, std::size_t tokens, std::size_t d, Extremes& e) noexcept {
  bool good = true;
  for (std::size_t first = 0; first < kBlockTokens; first += 16) {
    __m512 low[16];
    __m512 high[16];
    unsigned bad = 0;
    for (std::size_t j = 0; j < 16; ++j) {
      const T* row = first + j < tokens ? x + (first + j) * d : no_row(x);
      const __m512 v = load<kClean>(row);
      low[j] = high[j] = v;
      bad |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      for (std::size_t c = kLanes; c < d; c += kLanes) {
        const __m512 w = load<kClean>(row + c);
        bad |= _mm512_cmp_ps_mask(w, w, _CMP_UNORD_Q);
        low[j] = _mm512_min_ps(low[j], w);
        high[j] = _mm512_max_ps(high[j], w);
      }
    }
    const __m512 lowest = reduce_each(low, Smaller{});
    const __m512 highest = reduce_each(high, Larger{});
    _mm512_store_ps(e.low + first, lowest);
    _mm512_store_ps(e.high + first, highest);
    good &= bad == 0 && !beyond_f16(lowest, highest);
  }
  return good;
}

// Four dwords of codes -> one dword of their low bytes.
__m512i join_bytes(const __m512i (&code)[4]) noexcept {
  constexpr int kSelect = 0xE4;  // ternary logic: mask ? first : second, with the mask as third operand
  __m512i word = _mm512_slli_epi32(code[3], 24);
  word = _mm512_ternarylogic_epi32(word, _mm512_slli_epi32(code[2], 16),
                                   _mm512_set1_epi32(static_cast<int>(0xFF000000)), kSelect);
  word = _mm512_ternarylogic_epi32(word, _mm512_slli_epi32(code[1], 8), _mm512_set1_epi32(static_cast<int>(0xFFFF0000)),
                                   kSelect);
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

template <class T>
void un_v8(const std::int8_t* codes, const std::uint16_t* scales, std::size_t d, T* x) noexcept {
  for (std::size_t t = 0; t < kBlockTokens; t += 4) {
    __m512 scale[4];
    for (std::size_t j = 0; j < 4; ++j)
      scale[j] = _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(scales[t + j])));
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
