// Prefill attention with AVX-512: a block becomes f32 tiles once, then vfmadd231ps carries two small matrix products per tile.
//
// Rows of q are taken in bands: logits of the whole band, then its probabilities, then its values. So each product finds its tile
// in the L1 cache (K 32 KiB at head_dim 128, V 16 KiB a column of 64 channels), and only q and o stream past it.
// 6 rows x 4 vectors (64 tokens for q k, 64 channels for p v) are 24 accumulators: latency 4 at two a cycle (Zen 5; one a cycle
// on Zen 4) needs 8, and with 4 vectors of the tile and one broadcast 29 of the 32 registers are used. Per step 4 loads and 6
// broadcasts feed 24 products, so the two load ports keep up. Both tiles are read along a row of 64 lanes, one line after the other: no
// horizontal sums. About 0.94 of the FMA peak on Zen 5.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attend_isa.hpp"
#include "kernels/avx512vnni/lanes.hpp"
#include "kernels/prefill_band.hpp"

namespace inferos::kernels::avx512vnni {
namespace {

struct Scales {  // fp16 -> f32, once per block
  alignas(64) float scale[kMaxHeadDim];
  alignas(64) float minimum[kMaxHeadDim];

  Scales(const std::byte* at, std::size_t n, bool minima, float unit = 1.0F) noexcept {
    for (std::size_t i = 0; i < n; i += 16) {
      _mm512_store_ps(scale + i, _mm512_mul_ps(load_half(at + 2 * i), _mm512_set1_ps(unit)));
      if (minima) _mm512_store_ps(minimum + i, load_half(at + 2 * (n + i)));
    }
  }
};

// Byte j of every dword, as float.
__m512 byte_of(__m512i codes, unsigned j) noexcept {
  const __m512i pick =
      _mm512_add_epi32(_mm512_set4_epi32(12, 8, 4, 0), _mm512_set1_epi32(static_cast<int>(0x80808000U + j)));
  return _mm512_cvtepi32_ps(_mm512_shuffle_epi8(codes, pick));
}

// The tokens of a block that count, 16 a vector.
struct Kept {
  __mmask16 lanes[kT / 16];

  explicit Kept(TokenRange range) noexcept {
    for (std::size_t i = 0; i < kT / 16; ++i) lanes[i] = lanes_of(range, i);
  }
};

void expand_f16(const BlockView& block, std::size_t d, TokenRange range, float* k, float* v) noexcept {
  for (std::size_t panel = 0; panel < kT / 16; ++panel) {
    const __mmask16 kept = lanes_of(range, panel);
    const std::byte* keys = block.data + 32 * panel * d;
    for (std::size_t c = 0; c < d; ++c) {
      // A small block has no bytes behind its last panel.
      const __m512 x = kept == 0 ? _mm512_setzero_ps() : load_half(keys + 32 * c);
      _mm512_storeu_ps(k + kT * c + 16 * panel, _mm512_maskz_mov_ps(kept, x));
    }
  }
  const std::byte* values = block.data + std::size_t{block.capacity} * d * 2;
  for (std::size_t t = range.lo; t < range.hi; ++t) {
    unsigned nan = 0;
    for (std::size_t i = t * d; i < (t + 1) * d; i += 16) {
      const __m512 x = load_half(values + 2 * i);
      nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
      _mm512_storeu_ps(v + i, x);
    }
    if (nan == 0) continue;
    for (std::size_t i = t * d; i < (t + 1) * d; i += 16) _mm512_storeu_ps(v + i, _mm512_setzero_ps());
    k[t] = kNotANumber;
  }
}

// Byte j of each of the 64 dwords of codes is channel j: four rows of the tile.
void expand_k_rows(const __m512i (&codes)[4], const float* scale, const float* minimum, const Kept& kept,
                   float* k) noexcept {
  for (unsigned j = 0; j < 4; ++j) {
    const __m512 step = _mm512_set1_ps(scale[j]);
    const __m512 lowest = _mm512_set1_ps(minimum[j]);
    for (std::size_t i = 0; i < 4; ++i) {
      const __m512 x = _mm512_maskz_fmadd_ps(kept.lanes[i], step, byte_of(codes[i], j), lowest);
      _mm512_storeu_ps(k + kT * j + 16 * i, x);
    }
  }
}

void expand_k8(const std::byte* codes, const Scales& x, std::size_t d, TokenRange range, float* k) noexcept {
  const Kept kept(range);
  for (std::size_t c = 0; c < d; c += 4, codes += 128, k += 4 * kT) {
    const std::byte* const second = codes + 32 * d;  // tokens 32..63
    const __m512i four[4] = {_mm512_loadu_si512(codes), _mm512_loadu_si512(codes + 64), _mm512_loadu_si512(second),
                             _mm512_loadu_si512(second + 64)};
    expand_k_rows(four, x.scale + c, x.minimum + c, kept, k);
  }
}

void expand_k4(const std::byte* codes, const Scales& x, std::size_t d, TokenRange range, float* k) noexcept {
  const Kept kept(range);
  const __m512i nibble = _mm512_set1_epi8(15);
  for (std::size_t c = 0; c < d; c += 8, codes += 128, k += 8 * kT) {
    const std::byte* const second = codes + 16 * d;  // tokens 32..63
    const __m512i eight[4] = {_mm512_loadu_si512(codes), _mm512_loadu_si512(codes + 64), _mm512_loadu_si512(second),
                              _mm512_loadu_si512(second + 64)};
    __m512i low[4];
    __m512i high[4];
    for (std::size_t i = 0; i < 4; ++i) {
      low[i] = _mm512_and_si512(eight[i], nibble);
      high[i] = _mm512_and_si512(_mm512_srli_epi32(eight[i], 4), nibble);
    }
    expand_k_rows(low, x.scale + c, x.minimum + c, kept, k);
    expand_k_rows(high, x.scale + c + 4, x.minimum + c + 4, kept, k + 4 * kT);
  }
}

// The codes go to the top of their dwords: signed, and 2^24 times as large, which the scale makes good.
void expand_v8(const std::byte* codes, const Scales& x, std::size_t d, float* v) noexcept {
  const __m512i first = _mm512_set4_epi32(0x0C808080, 0x08808080, 0x04808080, static_cast<int>(0x00808080));
  for (std::size_t c = 0; c < d; c += 16) {
    for (std::size_t t = 0; t < kT; t += 4, codes += 64) {
      const __m512i four = _mm512_loadu_si512(codes);
      INFEROS_UNROLL
      for (int j = 0; j < 4; ++j) {
        const __m512i pick = _mm512_add_epi32(first, _mm512_set1_epi32(j << 24));
        const __m512 code = _mm512_cvtepi32_ps(_mm512_shuffle_epi8(four, pick));
        const std::size_t token = t + static_cast<std::size_t>(j);
        _mm512_storeu_ps(v + token * d + c, _mm512_mul_ps(_mm512_set1_ps(x.scale[token]), code));
      }
    }
  }
}

void expand_v4(const std::byte* codes, const Scales& x, std::size_t d, float* v) noexcept {
  const __m512i nibble = _mm512_set1_epi8(15);
  for (std::size_t c = 0; c < d; c += 16) {
    for (std::size_t t = 0; t < kT; t += 8, codes += 64) {
      const __m512i eight = _mm512_loadu_si512(codes);
      const __m512i halves[2] = {_mm512_and_si512(eight, nibble),
                                 _mm512_and_si512(_mm512_srli_epi32(eight, 4), nibble)};
      for (unsigned j = 0; j < 8; ++j) {
        const __m512 scale = _mm512_set1_ps(x.scale[t + j]);
        const __m512 minimum = _mm512_set1_ps(x.minimum[t + j]);
        _mm512_storeu_ps(v + (t + j) * d + c, _mm512_fmadd_ps(scale, byte_of(halves[j / 4], j % 4), minimum));
      }
    }
  }
}

// R rows x 16 V lanes in registers.
template <std::size_t R, std::size_t V>
struct Sums {
  __m512 at[R][V];
};

// sums[r][j] += a[r][i] * b[i][16 j ..] over i = from..to-1.
template <std::size_t R, std::size_t V>
inline void multiply(const float* a, std::size_t a_stride, const float* b, std::size_t b_stride, std::size_t from,
                     std::size_t to, Sums<R, V>& sums) noexcept {
  for (std::size_t i = from; i < to; ++i) {
    __m512 x[V];
    INFEROS_UNROLL
    for (std::size_t j = 0; j < V; ++j) x[j] = _mm512_loadu_ps(b + i * b_stride + 16 * j);
    INFEROS_UNROLL
    for (std::size_t r = 0; r < R; ++r) {
      const __m512 y = _mm512_set1_ps(a[r * a_stride + i]);
      INFEROS_UNROLL
      for (std::size_t j = 0; j < V; ++j) sums.at[r][j] = _mm512_fmadd_ps(y, x[j], sums.at[r][j]);
    }
  }
}

// Logits of R rows for 16 V tokens.
template <std::size_t R, std::size_t V>
void logits(Band& band, std::size_t row, std::size_t token) noexcept {
  const std::size_t d = band.tile.d;
  Sums<R, V> sums;
  INFEROS_UNROLL
  for (std::size_t r = 0; r < R; ++r) {
    INFEROS_UNROLL
    for (std::size_t j = 0; j < V; ++j) sums.at[r][j] = _mm512_setzero_ps();
  }
  multiply(band.tile.q + (band.first + row) * d, d, band.tile.k + token, kT, 0, d, sums);
  const __m512 scale = _mm512_set1_ps(band.tile.scale);
  INFEROS_UNROLL
  for (std::size_t r = 0; r < R; ++r) {
    float* const s = band.s[row + r] + token;
    INFEROS_UNROLL
    for (std::size_t j = 0; j < V; ++j) _mm512_store_ps(s + 16 * j, _mm512_mul_ps(scale, sums.at[r][j]));
  }
}

// Adds what tokens [range.lo, range.hi) give to 16 V channels of R rows.
template <std::size_t R, std::size_t V>
void values(const Band& band, std::size_t row, TokenRange range, std::size_t channel) noexcept {
  const std::size_t d = band.tile.d;
  float* const o = band.tile.o + (band.first + row) * d + channel;
  Sums<R, V> sums;
  INFEROS_UNROLL
  for (std::size_t r = 0; r < R; ++r) {
    const __m512 alpha = _mm512_set1_ps(band.alpha[row + r]);
    INFEROS_UNROLL
    for (std::size_t j = 0; j < V; ++j) {
      sums.at[r][j] = _mm512_add_ps(_mm512_mul_ps(_mm512_loadu_ps(o + r * d + 16 * j), alpha), _mm512_setzero_ps());
    }
  }
  multiply(band.s[row], kT, band.tile.v + channel, d, range.lo, range.hi, sums);
  INFEROS_UNROLL
  for (std::size_t r = 0; r < R; ++r) {
    const TokenRange seen = band.seen(row + r);
    if (seen.lo >= seen.hi) continue;  // left as it is
    INFEROS_UNROLL
    for (std::size_t j = 0; j < V; ++j) _mm512_storeu_ps(o + r * d + 16 * j, sums.at[r][j]);
  }
}

using Logits = void (*)(Band&, std::size_t, std::size_t) noexcept;
using Values = void (*)(const Band&, std::size_t, TokenRange, std::size_t) noexcept;

constexpr Logits kLogits[kRows][4] = {
    {logits<1, 1>, logits<1, 2>, logits<1, 3>, logits<1, 4>}, {logits<2, 1>, logits<2, 2>, logits<2, 3>, logits<2, 4>},
    {logits<3, 1>, logits<3, 2>, logits<3, 3>, logits<3, 4>}, {logits<4, 1>, logits<4, 2>, logits<4, 3>, logits<4, 4>},
    {logits<5, 1>, logits<5, 2>, logits<5, 3>, logits<5, 4>}, {logits<6, 1>, logits<6, 2>, logits<6, 3>, logits<6, 4>},
};
constexpr Values kValues[kRows][4] = {
    {values<1, 1>, values<1, 2>, values<1, 3>, values<1, 4>}, {values<2, 1>, values<2, 2>, values<2, 3>, values<2, 4>},
    {values<3, 1>, values<3, 2>, values<3, 3>, values<3, 4>}, {values<4, 1>, values<4, 2>, values<4, 3>, values<4, 4>},
    {values<5, 1>, values<5, 2>, values<5, 3>, values<5, 4>}, {values<6, 1>, values<6, 2>, values<6, 3>, values<6, 4>},
};

// As softmax_step, for rows that see all of the tile.
template <std::size_t N>
void softmax_whole(float (*s)[kT], float* m, float* l, float* alpha) noexcept {
  constexpr __mmask8 kUsed = (1U << N) - 1;
  __m512 across_tokens[N];
  INFEROS_UNROLL
  for (std::size_t r = 0; r < N; ++r) {
    const __m512 low = _mm512_max_ps(_mm512_load_ps(s[r]), _mm512_load_ps(s[r] + 16));
    const __m512 high = _mm512_max_ps(_mm512_load_ps(s[r] + 32), _mm512_load_ps(s[r] + 48));
    across_tokens[r] = _mm512_max_ps(low, high);
  }
  const __m128 old = _mm_maskz_loadu_ps(kUsed, m);
  const __m128 top = _mm_add_ps(_mm_max_ps(across<Largest>(across_tokens), old), _mm_setzero_ps());
  const __m128 base = _mm_andnot_ps(_mm_cmpeq_ps(top, _mm_set1_ps(kMinusInfinity)), top);
  alignas(16) float subtract[4];
  _mm_store_ps(subtract, base);
  INFEROS_UNROLL
  for (std::size_t r = 0; r < N; ++r) {
    const __m512 shift = _mm512_set1_ps(subtract[r]);
    __m512 sum = _mm512_setzero_ps();
    INFEROS_UNROLL
    for (std::size_t i = 0; i < 4; ++i) {
      const __m512 p = exp_nonpositive(_mm512_sub_ps(_mm512_load_ps(s[r] + 16 * i), shift));
      _mm512_store_ps(s[r] + 16 * i, p);
      sum = _mm512_add_ps(sum, p);
    }
    across_tokens[r] = sum;
  }
  const __m128 shrink = _mm512_castps512_ps128(exp_nonpositive(_mm512_zextps128_ps512(_mm_sub_ps(old, base))));
  _mm_mask_storeu_ps(alpha, kUsed, shrink);
  _mm_mask_storeu_ps(l, kUsed, _mm_fmadd_ps(_mm_maskz_loadu_ps(kUsed, l), shrink, across<Sum>(across_tokens)));
  _mm_mask_storeu_ps(m, kUsed, top);
}

// Logits of N rows -> probabilities; m and l of the tile and alpha of the band.
template <std::size_t N>
void softmax(Band& band, std::size_t row) noexcept {
  float* const m = band.tile.m + band.first + row;
  float* const l = band.tile.l + band.first + row;
  if (band.whole && !(band.tile.softcap > 0.0F) && band.all.lo == 0 && band.all.hi == kT)
    return softmax_whole<N>(band.s + row, m, l, band.alpha + row);
  TokenRange range[N];
  for (std::size_t r = 0; r < N; ++r) range[r] = band.seen(row + r);
  softmax_step<N>(band.s + row, range, band.tile.softcap, {}, m, l, band.alpha + row);
}

// Vectors of the next column of channels, so that none is too narrow to keep the multipliers busy.
std::size_t column(std::size_t vectors) noexcept {
  if (vectors <= 4) return vectors;
  return vectors % 4 == 1 || vectors % 4 == 2 ? 3 : 4;
}

void run(Band& band) noexcept {
  for (std::size_t row = 0; row < band.rows; row += kRows) {
    const std::size_t rows = band.rows - row < kRows ? band.rows - row : kRows;
    const TokenRange any = band.seen_by(row, rows);
    if (any.lo >= any.hi) continue;
    const std::size_t token = any.lo / 16 * 16;
    kLogits[rows - 1][(any.hi - token + 15) / 16 - 1](band, row, token);
  }
  std::size_t row = 0;
  for (; row + 4 <= band.rows; row += 4) softmax<4>(band, row);
  for (; row < band.rows; ++row) softmax<1>(band, row);
  const std::size_t vectors = band.tile.d / 16;
  for (std::size_t done = 0; done < vectors;) {
    const std::size_t width = column(vectors - done);
    for (row = 0; row < band.rows; row += kRows) {
      const std::size_t rows = band.rows - row < kRows ? band.rows - row : kRows;
      const TokenRange any = band.seen_by(row, rows);
      if (any.lo < any.hi) kValues[rows - 1][width - 1](band, row, any, 16 * done);
    }
    done += width;
  }
}

}  // namespace

void attend_expand(Format format, const BlockView& block, std::size_t d, float* k, float* v) noexcept {
  const TokenRange range{block.begin, block.end};
  if (format == Format::kF16) {
    expand_f16(block, d, range, k, v);
  } else {
    const BlockLayout layout = packed_layout(format, d);
    const Scales k_scales(block.data + layout.k_scales, d, true);
    const bool wide_v = format == Format::kInt8;
    const Scales v_scales(block.data + layout.v_scales, kT, !wide_v, wide_v ? 0x1p-24F : 1.0F);
    if (format == Format::kInt4)
      expand_k4(block.data, k_scales, d, range, k);
    else
      expand_k8(block.data, k_scales, d, range, k);
    if (format == Format::kInt8)
      expand_v8(block.data + layout.v_codes, v_scales, d, v);
    else
      expand_v4(block.data + layout.v_codes, v_scales, d, v);
  }
  for (std::size_t i = 0; i < range.lo * d; i += 16) _mm512_storeu_ps(v + i, _mm512_setzero_ps());
  for (std::size_t i = range.hi * d; i < kT * d; i += 16) _mm512_storeu_ps(v + i, _mm512_setzero_ps());
}

void attend_prefill(const PrefillTile& tile) noexcept {
  for (std::size_t row = 0; row < tile.rows; row += kBand) {
    Band band(tile, row, tile.rows - row < kBand ? tile.rows - row : kBand);
    run(band);
  }
}

}  // namespace inferos::kernels::avx512vnni
