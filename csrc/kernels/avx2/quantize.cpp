// Quantisers for AVX2 (with FMA and F16C). Lanes are 8 channels, two vectors a K or V tile column, so head_dim has no tail.
//
// What carries the loop, per 8 values, after the extremes are known (Zen 2 and later, Haswell and later):
//   vsubps, vmulps     2 per cycle          q = (x - minimum) * (1 / scale)
//   vcvtps2dq          1 or 2 per cycle     the code, rounded to nearest even
//   vcvtdq2ps          1 or 2 per cycle     |q - code| is the distance; vmaxps keeps the largest of a group (vroundps is 2 micro-ops)
//   vpackusdw/wb       1 or 2 per cycle     four tokens of 8 channels become [4 channels][4 tokens] per 128-bit lane, which is
//                                           a K tile's order, so packing is the transpose; vperm2i128 joins eight tokens
// The float quotient is off by at most 3 roundings, 255 * 3 * 2^-24 < 2^-14. Where one of the vectors of a group comes within
// 2^-12 of a tie, those that do are computed again in double: one in 256 on random data, and never a wrong code.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/block.hpp"
#include "kernels/tables.hpp"

namespace inferos::kernels::avx2 {
namespace {

constexpr std::size_t kLanes = 8;
using Vector = __m256;
using Words = __m256i;
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
constexpr int kUp = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
constexpr float kNearTie = 0.5F - 0x1p-12F;

__m256 high_limit() noexcept { return _mm256_set1_ps(65504.0F); }
__m256 low_limit() noexcept { return _mm256_set1_ps(-65504.0F); }
__m256 magnitude(__m256 x) noexcept { return _mm256_andnot_ps(_mm256_set1_ps(-0.0F), x); }

// NaN -> 0 and the clamp to fp16's range. Only data that has such values pays for it.
__m256 clean(__m256 x) noexcept {
  x = _mm256_and_ps(x, _mm256_cmp_ps(x, x, _CMP_ORD_Q));
  return _mm256_max_ps(_mm256_min_ps(x, high_limit()), low_limit());
}

template <bool kClean>
__m256 load(const float* x) noexcept {
  const __m256 v = _mm256_loadu_ps(x);
  return kClean ? clean(v) : v;
}
template <bool kClean>
__m256 load(const std::uint16_t* x) noexcept {
  const __m256 v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return kClean ? clean(v) : v;
}

void store(float* x, __m256 v) noexcept { _mm256_storeu_ps(x, v); }
void store(std::uint16_t* x, __m256 v) noexcept {  // saturating; NaN passes both min and max as their second operand
  v = _mm256_max_ps(low_limit(), _mm256_min_ps(high_limit(), v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_cvtps_ph(v, kNearest));
}

__m256i load_bytes(const void* from) noexcept { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

Vector load_floats(const float* x) noexcept { return _mm256_load_ps(x); }
void store_floats(float* x, Vector v) noexcept { _mm256_store_ps(x, v); }
Vector all(float x) noexcept { return _mm256_set1_ps(x); }
Words no_words() noexcept { return _mm256_setzero_si256(); }
void store_words(void* to, Words v) noexcept { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }

struct Grid {
  __m256 minimum, scale, inverse;
};

bool beyond_f16(__m256 low, __m256 high) noexcept {
  const __m256 beyond =
      _mm256_or_ps(_mm256_cmp_ps(high, high_limit(), _CMP_GT_OQ), _mm256_cmp_ps(low, low_limit(), _CMP_LT_OQ));
  return _mm256_movemask_ps(beyond) != 0;
}

// The smallest float >= y, for y >= 0: the conversion rounds to nearest, so step up where that went down.
__m128 ceil_f32(__m256d y) noexcept {
  const __m128 nearest = _mm256_cvtpd_ps(y);
  const __m128 next = _mm_castsi128_ps(_mm_add_epi32(_mm_castps_si128(nearest), _mm_set1_epi32(1)));
  const __m256d back = _mm256_cvtps_pd(nearest);
  return _mm256_cvtpd_ps(_mm256_blendv_pd(back, _mm256_cvtps_pd(next), _mm256_cmp_pd(back, y, _CMP_LT_OQ)));
}

__m256d low_half(__m256 x) noexcept { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
__m256d high_half(__m256 x) noexcept { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }

// The smallest fp16 >= (high - base) / steps: the quotient in double, then two roundings up (fp16 is a subset of f32).
__m128i ceil_f16(__m256 high, __m256 base, double steps) noexcept {
  const __m256d divisor = _mm256_set1_pd(steps);
  const __m256d q0 = _mm256_div_pd(_mm256_sub_pd(low_half(high), low_half(base)), divisor);
  const __m256d q1 = _mm256_div_pd(_mm256_sub_pd(high_half(high), high_half(base)), divisor);
  return _mm256_cvtps_ph(_mm256_set_m128(ceil_f32(q1), ceil_f32(q0)), kUp);
}

Grid grid_of(__m256 minimum, __m128i scale_bits) noexcept {
  const __m256 scale = _mm256_cvtph_ps(scale_bits);
  const __m256 some = _mm256_cmp_ps(scale, _mm256_setzero_ps(), _CMP_GT_OQ);
  return {minimum, scale, _mm256_and_ps(some, _mm256_div_ps(_mm256_set1_ps(1.0F), scale))};
}

Grid asymmetric(__m256 low, __m256 high, double steps, std::uint16_t* scales, std::uint16_t* minima) noexcept {
  const __m256 zero = _mm256_setzero_ps();  // x + 0 turns -0 into +0
  const __m128i floor = _mm256_cvtps_ph(_mm256_add_ps(low, zero), kDown);
  const __m256 minimum = _mm256_cvtph_ps(floor);
  const __m128i ceil = ceil_f16(_mm256_add_ps(high, zero), minimum, steps);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(scales), ceil);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(minima), floor);
  return grid_of(minimum, ceil);
}

Grid symmetric(__m256 low, __m256 high, std::uint16_t* scales) noexcept {
  const __m128i ceil = ceil_f16(_mm256_max_ps(magnitude(low), magnitude(high)), _mm256_setzero_ps(), 127.0);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(scales), ceil);
  return grid_of(_mm256_setzero_ps(), ceil);
}

// Codes by the specification's double arithmetic, four lanes: guess, then compare with the exact boundaries.
__m128i exact4(__m256d x, __m256d minimum, __m256d scale) noexcept {
  const __m256d half = _mm256_mul_pd(scale, _mm256_set1_pd(0.5));
  const __m256d one = _mm256_set1_pd(1.0);
  __m256d code = _mm256_round_pd(_mm256_div_pd(_mm256_sub_pd(x, minimum), scale), kNearest);
  const __m256d here = _mm256_add_pd(minimum, _mm256_mul_pd(scale, code));
  const __m256d above = _mm256_cmp_pd(x, _mm256_add_pd(here, half), _CMP_GT_OQ);
  const __m256d below = _mm256_cmp_pd(x, _mm256_sub_pd(here, half), _CMP_LT_OQ);
  code = _mm256_sub_pd(_mm256_add_pd(code, _mm256_and_pd(above, one)), _mm256_and_pd(below, one));
  return _mm256_cvtpd_epi32(_mm256_and_pd(code, _mm256_cmp_pd(scale, _mm256_setzero_pd(), _CMP_GT_OQ)));
}

__m256i exact8(__m256 x, const Grid& g) noexcept {
  const __m128i lower = exact4(low_half(x), low_half(g.minimum), low_half(g.scale));
  const __m128i upper = exact4(high_half(x), high_half(g.minimum), high_half(g.scale));
  return _mm256_set_m128i(upper, lower);
}

template <bool kSymmetric>
__m256 quotient(__m256 x, const Grid& g) noexcept {
  return _mm256_mul_ps(kSymmetric ? x : _mm256_sub_ps(x, g.minimum), g.inverse);
}

__m256 distance(__m256 q, __m256i code) noexcept { return magnitude(_mm256_sub_ps(q, _mm256_cvtepi32_ps(code))); }

// Codes of one vector; `worst` collects the largest distance of a quotient from its code.
template <bool kSymmetric>
__m256i encode(__m256 x, const Grid& g, __m256& worst) noexcept {
  const __m256 q = quotient<kSymmetric>(x, g);
  const __m256i code = _mm256_cvtps_epi32(q);
  worst = _mm256_max_ps(worst, distance(q, code));
  return code;
}

bool near_tie(__m256 worst) noexcept {
  return _mm256_movemask_ps(_mm256_cmp_ps(worst, _mm256_set1_ps(kNearTie), _CMP_GE_OQ)) != 0;
}

template <bool kSymmetric>
__m256i encode_again(__m256 x, const Grid& g, __m256i code) noexcept {
  return near_tie(distance(quotient<kSymmetric>(x, g), code)) ? exact8(x, g) : code;
}

// Four vectors of codes up to 255 -> per 128-bit lane [4 vectors][4 codes].
Words pack_bytes(const Words (&code)[4]) noexcept {
  return _mm256_packus_epi16(_mm256_packus_epi32(code[0], code[1]), _mm256_packus_epi32(code[2], code[3]));
}

#include "kernels/quantize_parts.hpp"

// ---- K: per channel over the tokens -------------------------------------------------------------------------------

// Extremes of kColumns * 8 channels, in registers while the rows stream by; false where a value is NaN or beyond fp16.
template <bool kClean, std::size_t kColumns, class T>
bool extremes_of_columns(const T* x, std::size_t tokens, std::size_t d, float* to_low, float* to_high) noexcept {
  __m256 low[kColumns];
  __m256 high[kColumns];
  for (std::size_t i = 0; i < kColumns; ++i) low[i] = high[i] = load<kClean>(x + i * kLanes);
  __m256 bad = _mm256_setzero_ps();
  for (std::size_t t = 0; t < tokens; ++t) {
    __m256 v[kColumns];
    for (std::size_t i = 0; i < kColumns; ++i) {
      v[i] = load<kClean>(x + t * d + i * kLanes);
      low[i] = _mm256_min_ps(low[i], v[i]);
      high[i] = _mm256_max_ps(high[i], v[i]);
    }
    for (std::size_t i = 0; i < kColumns; i += 2) {  // one comparison finds a NaN in either operand
      bad = _mm256_or_ps(bad, _mm256_cmp_ps(v[i], v[i + 1], _CMP_UNORD_Q));
    }
  }
  bool good = _mm256_movemask_ps(bad) == 0;
  for (std::size_t i = 0; i < kColumns; ++i) {
    _mm256_store_ps(to_low + i * kLanes, low[i]);
    _mm256_store_ps(to_high + i * kLanes, high[i]);
    good &= !beyond_f16(low[i], high[i]);
  }
  return good;
}

template <bool kClean, class T>
bool extremes_of_channels(const T* x, std::size_t tokens, std::size_t d, Extremes& e) noexcept {
  bool good = true;
  for (std::size_t c = 0; c < d;) {
    if (d - c >= 4 * kLanes) {
      good &= extremes_of_columns<kClean, 4>(x + c, tokens, d, e.low + c, e.high + c);
      c += 4 * kLanes;
    } else {
      good &= extremes_of_columns<kClean, 2>(x + c, tokens, d, e.low + c, e.high + c);
      c += 2 * kLanes;
    }
  }
  return good;
}

struct Quads {
  __m256i first, second;  // [8 tokens][4 channels] each
};

Quads swap_lanes(__m256i a, __m256i b) noexcept {  // its own inverse
  return {_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)};
}

// Eight tokens of 8 channels.
template <bool kClean, class T>
[[gnu::always_inline]] inline Quads encode_panel(const T* x, std::size_t d, std::size_t count, const Grid& g) noexcept {
  if (count >= 8) return swap_lanes(encode_four<kClean>(x, d, 4, g), encode_four<kClean>(x + 4 * d, d, 4, g));
  const std::size_t lower = count < 4 ? count : 4;
  return swap_lanes(encode_four<kClean>(x, d, lower, g), encode_four<kClean>(x + 4 * d, d, count - lower, g));
}

template <int kBits, bool kClean, class T>
void encode_keys(const T* x, std::size_t tokens, std::size_t d, const Grids& grids, std::uint8_t* codes) noexcept {
  for (std::size_t t = 0; t < kBlockTokens; t += 8) {
    const std::size_t count = tokens > t ? tokens - t : 0;
    for (std::size_t c = 0; c < d; c += kLanes) {
      const Quads quads = encode_panel<kClean>(x + t * d + c, d, count, grids.vector(c));
      if constexpr (kBits == 8) {
        std::uint8_t* to = codes + k_offset<4>(t, c, d);
        store_words(to, quads.first);
        store_words(to + 128, quads.second);
      } else {
        store_words(codes + k_offset<8>(t, c, d), _mm256_or_si256(quads.first, _mm256_slli_epi32(quads.second, 4)));
      }
    }
  }
}

template <int kBits, class T>
void dequantize_k(const std::uint8_t* codes, const std::uint16_t* scales_minima, std::size_t d, T* x) noexcept {
  // Byte i of the first word of every 128-bit lane -> dword i.
  const __m256i spread =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, 3, -1, -1, -1));
  const __m256i nibble = _mm256_set1_epi8(15);
  for (std::size_t t = 0; t < kBlockTokens; t += 8) {
    for (std::size_t c = 0; c < d; c += kLanes) {
      const __m256 scale = load<false>(scales_minima + c);
      const __m256 minimum = load<false>(scales_minima + d + c);
      __m256i four[2];
      if constexpr (kBits == 8) {
        const std::uint8_t* from = codes + k_offset<4>(t, c, d);
        four[0] = load_bytes(from);
        four[1] = load_bytes(from + 128);
      } else {
        const __m256i bytes = load_bytes(codes + k_offset<8>(t, c, d));
        four[0] = _mm256_and_si256(bytes, nibble);
        four[1] = _mm256_and_si256(_mm256_srli_epi32(bytes, 4), nibble);
      }
      const Quads tokens = swap_lanes(four[0], four[1]);
      __m256i word = tokens.first;
      for (std::size_t i = 0; i < 8; ++i, word = i == 4 ? tokens.second : _mm256_srli_si256(word, 4)) {
        const __m256 code = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(word, spread));
        store(x + (t + i) * d + c, _mm256_fmadd_ps(scale, code, minimum));
      }
    }
  }
}

// ---- V: per token over the channels -------------------------------------------------------------------------------

struct Smaller {
  __m256 operator()(__m256 a, __m256 b) const noexcept { return _mm256_min_ps(a, b); }
};
struct Larger {
  __m256 operator()(__m256 a, __m256 b) const noexcept { return _mm256_max_ps(a, b); }
};

// Eight vectors -> one whose lane t is vector t, reduced: the first steps of a transpose with a reduction after each.
template <class Pick>
__m256 reduce_each(const __m256 (&v)[8], Pick pick) noexcept {
  __m256 four[2];  // per 128-bit lane: what is left of vectors 4i .. 4i+3
  for (std::size_t i = 0; i < 2; ++i) {
    const __m256* w = v + 4 * i;
    const __m256 a = pick(_mm256_unpacklo_ps(w[0], w[1]), _mm256_unpackhi_ps(w[0], w[1]));
    const __m256 b = pick(_mm256_unpacklo_ps(w[2], w[3]), _mm256_unpackhi_ps(w[2], w[3]));
    four[i] = pick(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xEE));
  }
  return pick(_mm256_permute2f128_ps(four[0], four[1], 0x20), _mm256_permute2f128_ps(four[0], four[1], 0x31));
}

// Extremes of every token; false where a value is NaN or beyond fp16. Tokens that are not there get 0.
template <bool kClean, class T>
bool extremes_of_tokens(const T* x, std::size_t tokens, std::size_t d, Extremes& e) noexcept {
  bool good = true;
  for (std::size_t first = 0; first < kBlockTokens; first += 8) {
    __m256 low[8];
    __m256 high[8];
    __m256 bad = _mm256_setzero_ps();
    for (std::size_t j = 0; j < 8; ++j) {
      const T* row = first + j < tokens ? x + (first + j) * d : no_row(x);
      const __m256 v = load<kClean>(row);
      low[j] = high[j] = v;
      for (std::size_t c = 0; c < d; c += 2 * kLanes) {
        const __m256 a = load<kClean>(row + c);
        const __m256 b = load<kClean>(row + c + kLanes);
        bad = _mm256_or_ps(bad, _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
        low[j] = _mm256_min_ps(low[j], _mm256_min_ps(a, b));
        high[j] = _mm256_max_ps(high[j], _mm256_max_ps(a, b));
      }
    }
    const __m256 lowest = reduce_each(low, Smaller{});
    const __m256 highest = reduce_each(high, Larger{});
    _mm256_store_ps(e.low + first, lowest);
    _mm256_store_ps(e.high + first, highest);
    good &= _mm256_movemask_ps(bad) == 0 && !beyond_f16(lowest, highest);
  }
  return good;
}

// Four dwords of codes -> one dword of their low bytes.
__m256i join_bytes(const __m256i (&code)[4]) noexcept {
  const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(code[0], code[1]), _mm256_packs_epi32(code[2], code[3]));
  // Per 128-bit lane [4 tokens][4 channels] -> [4 channels][4 tokens].
  return _mm256_shuffle_epi8(
      words, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}

// Eight dwords of 4-bit codes -> one dword: byte j has code j below and code 4 + j above.
__m256i join_nibbles(const __m256i (&code)[8]) noexcept {
  __m256i pair[4];
  for (std::size_t j = 0; j < 4; ++j) pair[j] = _mm256_or_si256(code[j], _mm256_slli_epi32(code[4 + j], 4));
  const __m256i words =
      _mm256_packus_epi16(_mm256_packus_epi32(pair[0], pair[1]), _mm256_packus_epi32(pair[2], pair[3]));
  return _mm256_shuffle_epi8(
      words, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}

__m256 widen(std::uint16_t half) noexcept { return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<short>(half))); }

template <class T>
void un_v8(const std::int8_t* codes, const std::uint16_t* scales, std::size_t d, T* x) noexcept {
  for (std::size_t t = 0; t < kBlockTokens; t += 4) {
    __m256 scale[4];
    for (std::size_t j = 0; j < 4; ++j) scale[j] = widen(scales[t + j]);
    for (std::size_t c = 0; c < d; c += kLanes) {
      const __m256i word = load_bytes(codes + (c / 16 * (kBlockTokens / 4) + t / 4) * 64 + c % 16 * 4);
      for (int j = 0; j < 4; ++j) {
        const __m256i code = _mm256_srai_epi32(_mm256_slli_epi32(word, 24 - 8 * j), 24);
        const auto token = static_cast<std::size_t>(j);
        store(x + (t + token) * d + c, _mm256_mul_ps(scale[token], _mm256_cvtepi32_ps(code)));
      }
    }
  }
}

template <class T>
void un_v4(const std::uint8_t* codes, const std::uint16_t* scales_minima, std::size_t d, T* x) noexcept {
  const __m256i nibble = _mm256_set1_epi32(15);
  for (std::size_t t = 0; t < kBlockTokens; t += 8) {
    __m256 scale[8];
    __m256 minimum[8];
    for (std::size_t j = 0; j < 8; ++j) {
      scale[j] = widen(scales_minima[t + j]);
      minimum[j] = widen(scales_minima[kBlockTokens + t + j]);
    }
    for (std::size_t c = 0; c < d; c += kLanes) {
      const __m256i word = load_bytes(codes + (c / 16 * (kBlockTokens / 8) + t / 8) * 64 + c % 16 * 4);
      for (int j = 0; j < 8; ++j) {
        const __m256i code = _mm256_and_si256(_mm256_srli_epi32(word, j % 4 * 8 + j / 4 * 4), nibble);
        const auto token = static_cast<std::size_t>(j);
        store(x + (t + token) * d + c, _mm256_fmadd_ps(scale[token], _mm256_cvtepi32_ps(code), minimum[token]));
      }
    }
  }
}

template <class T>
constexpr QuantizeOf<T> table() noexcept {
  return {quantize_k<8, T>, quantize_k<4, T>, v8<T>, v4<T>, dequantize_k<8, T>, dequantize_k<4, T>, un_v8<T>, un_v4<T>};
}

}  // namespace

const Quantize kQuantize{Isa::kAvx2, table<float>(), table<std::uint16_t>()};

}  // namespace inferos::kernels::avx2
