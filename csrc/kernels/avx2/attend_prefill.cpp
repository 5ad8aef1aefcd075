// Prefill attention with AVX2: a block becomes f32 tiles once, then vfmadd231ps carries two small matrix products per tile.
//
// Rows of q are taken in bands: logits of the whole band, then its probabilities, then its values, a column of 16 lanes of the tile
// after the other. So a column (8 KiB of K at head_dim 128, 4 KiB of V) stays in the L1 cache, and only q and o stream past it.
// 6 rows x 2 vectors are 12 accumulators: latency 4 at two a cycle (Zen 2 to 5) needs 8, and with 2 vectors of the tile and one
// broadcast 15 of the 16 registers are used. Per step 2 loads and 6 broadcasts feed 12 products. No horizontal sums.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attend_isa.hpp"
#include "kernels/avx2/lanes.hpp"
#include "kernels/prefill_band.hpp"

namespace inferos::kernels::avx2 {
namespace {

constexpr std::size_t kLanes = 16;  // of a register block

struct Scales {  // fp16 -> f32, once per block
  alignas(32) float scale[kMaxHeadDim];
  alignas(32) float minimum[kMaxHeadDim];

  Scales(const std::byte* at, std::size_t n, bool minima) noexcept {
    for (std::size_t i = 0; i < n; i += 8) {
      _mm256_store_ps(scale + i, load_half(at + 2 * i));
      if (minima) _mm256_store_ps(minimum + i, load_half(at + 2 * (n + i)));
    }
  }
};

// Bits `shift`.. of every dword under `mask`, as float.
__m256 field(__m256i codes, int shift, int mask) noexcept {
  return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(codes, shift), _mm256_set1_epi32(mask)));
}

void expand_f16(const BlockView& block, std::size_t d, TokenRange range, float* k, float* v) noexcept {
  for (std::size_t vector = 0; vector < kT / 8; ++vector) {
    const __m256 kept = lanes_of(range, vector);
    const bool any = _mm256_movemask_ps(kept) != 0;  // a small block has no bytes behind its last panel
    const std::byte* keys = block.data + 32 * (vector / 2) * d + vector % 2 * 16;
    for (std::size_t c = 0; c < d; ++c) {
      const __m256 x = any ? load_half(keys + 32 * c) : _mm256_setzero_ps();
      _mm256_storeu_ps(k + kT * c + 8 * vector, _mm256_and_ps(kept, x));
    }
  }
  const std::byte* values = block.data + std::size_t{block.capacity} * d * 2;
  for (std::size_t t = range.lo; t < range.hi; ++t) {
    __m256 nan = _mm256_setzero_ps();
    for (std::size_t i = t * d; i < (t + 1) * d; i += 8) {
      const __m256 x = load_half(values + 2 * i);
      nan = _mm256_or_ps(nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
      _mm256_storeu_ps(v + i, x);
    }
    if (_mm256_movemask_ps(nan) == 0) continue;
    for (std::size_t i = t * d; i < (t + 1) * d; i += 8) _mm256_storeu_ps(v + i, _mm256_setzero_ps());
    k[t] = kNotANumber;
  }
}

// kWide: 4 channels of a byte each in a dword; else 8 of a nibble each.
template <bool kWide>
void expand_k(const std::byte* codes, const Scales& x, std::size_t d, TokenRange range, float* k) noexcept {
  constexpr std::size_t kChannels = kWide ? 4 : 8;
  for (std::size_t vector = 0; vector < kT / 8; ++vector) {
    const __m256 kept = lanes_of(range, vector);
    const std::byte* at = codes + vector / 4 * 128 / kChannels * d + vector % 4 * 32;
    float* to = k + 8 * vector;
    for (std::size_t c = 0; c < d; c += kChannels, at += 128) {
      const __m256i several = load_bytes(at);
      for (std::size_t j = 0; j < kChannels; ++j, to += kT) {
        const __m256 code = field(several, static_cast<int>(8 * (j % 4) + j / 4 * 4), kWide ? 255 : 15);
        const __m256 value = _mm256_fmadd_ps(_mm256_set1_ps(x.scale[c + j]), code, _mm256_set1_ps(x.minimum[c + j]));
        _mm256_storeu_ps(to, _mm256_and_ps(kept, value));
      }
    }
  }
}

void expand_v8(const std::byte* codes, const Scales& x, std::size_t d, float* v) noexcept {
  for (std::size_t c = 0; c < d; c += 8) {
    const std::byte* at = codes + c / 16 * 16 * kT + c % 16 * 4;
    for (std::size_t t = 0; t < kT; t += 4, at += 64) {
      const __m256i four = load_bytes(at);
      for (std::size_t j = 0; j < 4; ++j) {
        const __m256i code = _mm256_srai_epi32(_mm256_slli_epi32(four, static_cast<int>(24 - 8 * j)), 24);
        _mm256_storeu_ps(v + (t + j) * d + c, _mm256_mul_ps(_mm256_set1_ps(x.scale[t + j]), _mm256_cvtepi32_ps(code)));
      }
    }
  }
}

void expand_v4(const std::byte* codes, const Scales& x, std::size_t d, float* v) noexcept {
  for (std::size_t c = 0; c < d; c += 8) {
    const std::byte* at = codes + c / 16 * 8 * kT + c % 16 * 4;
    for (std::size_t t = 0; t < kT; t += 8, at += 64) {
      const __m256i eight = load_bytes(at);
      for (std::size_t j = 0; j < 8; ++j) {
        const __m256 code = field(eight, static_cast<int>(8 * (j % 4) + j / 4 * 4), 15);
        const __m256 value = _mm256_fmadd_ps(_mm256_set1_ps(x.scale[t + j]), code, _mm256_set1_ps(x.minimum[t + j]));
        _mm256_storeu_ps(v + (t + j) * d + c, value);
      }
    }
  }
}

template <std::size_t R>
struct Sums {  // R rows x 16 lanes
  __m256 at[R][2];
};

// sums[r] += a[r][i] * b[i][0..15] over i = from..to-1.
template <std::size_t R>
inline void multiply(const float* a, std::size_t a_stride, const float* b, std::size_t b_stride, std::size_t from,
                     std::size_t to, Sums<R>& sums) noexcept {
  for (std::size_t i = from; i < to; ++i) {
    const __m256 low = _mm256_loadu_ps(b + i * b_stride);
    const __m256 high = _mm256_loadu_ps(b + i * b_stride + 8);
    INFEROS_UNROLL
    for (std::size_t r = 0; r < R; ++r) {
      const __m256 y = _mm256_set1_ps(a[r * a_stride + i]);
      sums.at[r][0] = _mm256_fmadd_ps(y, low, sums.at[r][0]);
      sums.at[r][1] = _mm256_fmadd_ps(y, high, sums.at[r][1]);
    }
  }
}

// Logits of R rows for 16 tokens.
template <std::size_t R>
void logits(Band& band, std::size_t row, std::size_t token) noexcept {
  const std::size_t d = band.tile.d;
  Sums<R> sums;
  INFEROS_UNROLL
  for (std::size_t r = 0; r < R; ++r) sums.at[r][0] = sums.at[r][1] = _mm256_setzero_ps();
  multiply(band.tile.q + (band.first + row) * d, d, band.tile.k + token, kT, 0, d, sums);
  const __m256 scale = _mm256_set1_ps(band.tile.scale);
  INFEROS_UNROLL
  for (std::size_t r = 0; r < R; ++r) {
    float* const s = band.s[row + r] + token;
    _mm256_store_ps(s, _mm256_mul_ps(scale, sums.at[r][0]));
    _mm256_store_ps(s + 8, _mm256_mul_ps(scale, sums.at[r][1]));
  }
}

// Adds what tokens [range.lo, range.hi) give to 16 channels of R rows.
template <std::size_t R>
void values(const Band& band, std::size_t row, TokenRange range, std::size_t channel) noexcept {
  const std::size_t d = band.tile.d;
  float* const o = band.tile.o + (band.first + row) * d + channel;
  Sums<R> sums;
  INFEROS_UNROLL
  for (std::size_t r = 0; r < R; ++r) {
    const __m256 alpha = _mm256_set1_ps(band.alpha[row + r]);
    const float* const from = o + r * d;
    sums.at[r][0] = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(from), alpha), _mm256_setzero_ps());
    sums.at[r][1] = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(from + 8), alpha), _mm256_setzero_ps());
  }
  multiply(band.s[row], kT, band.tile.v + channel, d, range.lo, range.hi, sums);
  INFEROS_UNROLL
  for (std::size_t r = 0; r < R; ++r) {
    const TokenRange seen = band.seen(row + r);
    if (seen.lo >= seen.hi) continue;  // left as it is
    _mm256_storeu_ps(o + r * d, sums.at[r][0]);
    _mm256_storeu_ps(o + r * d + 8, sums.at[r][1]);
  }
}

using Logits = void (*)(Band&, std::size_t, std::size_t) noexcept;
using Values = void (*)(const Band&, std::size_t, TokenRange, std::size_t) noexcept;
constexpr Logits kLogits[kRows] = {logits<1>, logits<2>, logits<3>, logits<4>, logits<5>, logits<6>};
constexpr Values kValues[kRows] = {values<1>, values<2>, values<3>, values<4>, values<5>, values<6>};

// As softmax_step, for a row that sees all of the tile. Returns alpha.
float softmax_whole(float* s, float& m, float& l) noexcept {
  __m256 largest[4];
  INFEROS_UNROLL
  for (std::size_t i = 0; i < 4; ++i)
    largest[i] = _mm256_max_ps(_mm256_load_ps(s + 8 * i), _mm256_load_ps(s + 8 * i + 32));
  const float block =
      largest8(_mm256_max_ps(_mm256_max_ps(largest[0], largest[1]), _mm256_max_ps(largest[2], largest[3])));
  const float top = (block > m ? block : m) + 0.0F;
  const float base = top == kMinusInfinity ? 0.0F : top;
  const __m256 subtract = _mm256_set1_ps(base);
  __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  INFEROS_UNROLL
  for (std::size_t i = 0; i < 8; ++i) {
    const __m256 p = exp_nonpositive(_mm256_sub_ps(_mm256_load_ps(s + 8 * i), subtract));
    _mm256_store_ps(s + 8 * i, p);
    sum[i % 2] = _mm256_add_ps(sum[i % 2], p);
  }
  const float alpha = m == base ? 1.0F : exp_nonpositive(m - base);
  const __m128 total = _mm_set_ss(reduce16(sum[0], sum[1]));
  l = _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(l), _mm_set_ss(alpha), total));
  m = top;
  return alpha;
}

// Logits of a row -> probabilities; m and l of the tile and alpha of the band.
void softmax(Band& band, std::size_t row) noexcept {
  float& m = band.tile.m[band.first + row];
  float& l = band.tile.l[band.first + row];
  const bool simple = band.whole && band.all.lo == 0 && band.all.hi == kT && !(band.tile.softcap > 0.0F);
  band.alpha[row] = simple ? softmax_whole(band.s[row], m, l)
                           : softmax_step(band.s[row], band.seen(row), band.tile.softcap, {}, m, l).alpha;
}

void run(Band& band) noexcept {
  for (std::size_t token = 0; token < kT; token += kLanes) {
    for (std::size_t row = 0; row < band.rows; row += kRows) {
      const std::size_t rows = band.rows - row < kRows ? band.rows - row : kRows;
      const TokenRange any = band.seen_by(row, rows);
      if (any.lo < token + kLanes && token < any.hi) kLogits[rows - 1](band, row, token);
    }
  }
  for (std::size_t row = 0; row < band.rows; ++row) softmax(band, row);
  for (std::size_t channel = 0; channel < band.tile.d; channel += kLanes) {
    for (std::size_t row = 0; row < band.rows; row += kRows) {
      const std::size_t rows = band.rows - row < kRows ? band.rows - row : kRows;
      const TokenRange any = band.seen_by(row, rows);
      if (any.lo < any.hi) kValues[rows - 1](band, row, any, channel);
    }
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
    const Scales v_scales(block.data + layout.v_scales, kT, format != Format::kInt8);
    if (format == Format::kInt4)
      expand_k<false>(block.data, k_scales, d, range, k);
    else
      expand_k<true>(block.data, k_scales, d, range, k);
    if (format == Format::kInt8)
      expand_v8(block.data + layout.v_codes, v_scales, d, v);
    else
      expand_v4(block.data + layout.v_codes, v_scales, d, v);
  }
  for (std::size_t i = 0; i < range.lo * d; i += 8) _mm256_storeu_ps(v + i, _mm256_setzero_ps());
  for (std::size_t i = range.hi * d; i < kT * d; i += 8) _mm256_storeu_ps(v + i, _mm256_setzero_ps());
}

void attend_prefill(const PrefillTile& tile) noexcept {
  for (std::size_t row = 0; row < tile.rows; row += kBand) {
    Band band(tile, row, tile.rows - row < kBand ? tile.rows - row : kBand);
    run(band);
  }
}

}  // namespace inferos::kernels::avx2
