// Prefill attention with AVX2: a block becomes f32 tiles once, then vfmadd231ps carries two small matrix products per tile.
//
// 6 query rows x 2 vectors (16 tokens for q k, 16 channels for p v) are 12 accumulators: latency 4 at two a cycle needs 8, and
// with 2 vectors of the tile and one broadcast 15 of the 16 registers are used. Per step 2 loads and 6 broadcasts feed 12
// products. K is laid out with tokens as lanes, V with channels: no horizontal sums.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attend_isa.hpp"
#include "kernels/avx2/lanes.hpp"

namespace inferos::kernels::avx2 {
namespace {

constexpr std::size_t kT = kBlockTokens;
constexpr std::size_t kRows = 6;

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
    float* to = k + 16 * (vector / 2) * d + vector % 2 * 8;
    for (std::size_t c = 0; c < d; ++c) {
      const __m256 x = any ? load_half(keys + 32 * c) : _mm256_setzero_ps();
      _mm256_storeu_ps(to + 16 * c, _mm256_and_ps(kept, x));
    }
  }
  const std::byte* values = block.data + std::size_t{block.capacity} * d * 2;
  for (std::size_t i = range.lo * d; i < range.hi * d; i += 8) _mm256_storeu_ps(v + i, load_half(values + 2 * i));
}

// kWide: 4 channels of a byte each in a dword; else 8 of a nibble each.
template <bool kWide>
void expand_k(const std::byte* codes, const Scales& x, std::size_t d, TokenRange range, float* k) noexcept {
  constexpr std::size_t kChannels = kWide ? 4 : 8;
  for (std::size_t vector = 0; vector < kT / 8; ++vector) {
    const __m256 kept = lanes_of(range, vector);
    const std::byte* at = codes + vector / 4 * 128 / kChannels * d + vector % 4 * 32;
    float* to = k + vector / 2 * 16 * d + vector % 2 * 8;
    for (std::size_t c = 0; c < d; c += kChannels, at += 128) {
      const __m256i several = load_bytes(at);
      for (std::size_t j = 0; j < kChannels; ++j, to += 16) {
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

struct Rows {  // of one register block
  const PrefillTile& tile;
  std::size_t first;
  TokenRange range[kRows];
  float alpha[kRows];
  alignas(32) float s[kRows][kT];

  Rows(const PrefillTile& of, std::size_t row) noexcept : tile(of), first(row), alpha{} {}
};

template <std::size_t R>
void logits(Rows& x) noexcept {
  const std::size_t d = x.tile.d;
  const float* q = x.tile.q + x.first * d;
  const __m256 scale = _mm256_set1_ps(x.tile.scale);
  for (std::size_t t = 0; t < kT; t += 16) {
    const float* k = x.tile.k + t * d;
    __m256 sum[R][2];
    for (std::size_t r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
    for (std::size_t c = 0; c < d; ++c, k += 16) {
      const __m256 k0 = _mm256_loadu_ps(k);
      const __m256 k1 = _mm256_loadu_ps(k + 8);
      for (std::size_t r = 0; r < R; ++r) {
        const __m256 qv = _mm256_set1_ps(q[r * d + c]);
        sum[r][0] = _mm256_fmadd_ps(qv, k0, sum[r][0]);
        sum[r][1] = _mm256_fmadd_ps(qv, k1, sum[r][1]);
      }
    }
    for (std::size_t r = 0; r < R; ++r) {
      _mm256_store_ps(x.s[r] + t, _mm256_mul_ps(scale, sum[r][0]));
      _mm256_store_ps(x.s[r] + t + 8, _mm256_mul_ps(scale, sum[r][1]));
    }
  }
}

template <std::size_t R>
void values(const Rows& x) noexcept {
  const std::size_t d = x.tile.d;
  for (std::size_t channel = 0; channel < d; channel += 16) {
    float* o = x.tile.o + x.first * d + channel;
    __m256 sum[R][2];
    for (std::size_t r = 0; r < R; ++r) {
      const __m256 alpha = _mm256_set1_ps(x.alpha[r]);
      sum[r][0] = _mm256_mul_ps(_mm256_loadu_ps(o + r * d), alpha);
      sum[r][1] = _mm256_mul_ps(_mm256_loadu_ps(o + r * d + 8), alpha);
    }
    for (std::size_t t = x.tile.begin; t < x.tile.end; ++t) {
      const __m256 v0 = _mm256_loadu_ps(x.tile.v + t * d + channel);
      const __m256 v1 = _mm256_loadu_ps(x.tile.v + t * d + channel + 8);
      for (std::size_t r = 0; r < R; ++r) {
        const __m256 p = _mm256_set1_ps(x.s[r][t]);
        sum[r][0] = _mm256_fmadd_ps(p, v0, sum[r][0]);
        sum[r][1] = _mm256_fmadd_ps(p, v1, sum[r][1]);
      }
    }
    for (std::size_t r = 0; r < R; ++r) {
      if (x.range[r].lo >= x.range[r].hi) continue;  // left as it is
      _mm256_storeu_ps(o + r * d, sum[r][0]);
      _mm256_storeu_ps(o + r * d + 8, sum[r][1]);
    }
  }
}

template <std::size_t R>
void run_rows(const PrefillTile& tile, std::size_t first) noexcept {
  Rows x(tile, first);
  bool any = false;
  for (std::size_t r = 0; r < R; ++r) {
    x.range[r] = visible_tokens(tile.start, tile.begin, tile.end, tile.visible[first + r]);
    any = any || x.range[r].lo < x.range[r].hi;
  }
  if (!any) return;
  logits<R>(x);
  for (std::size_t r = 0; r < R; ++r) {
    if (x.range[r].lo >= x.range[r].hi) continue;
    x.alpha[r] = softmax_step(x.s[r], x.range[r], tile.softcap, nullptr, tile.m[first + r], tile.l[first + r]).alpha;
  }
  values<R>(x);
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
  std::size_t row = 0;
  for (; row + kRows <= tile.rows; row += kRows) run_rows<kRows>(tile, row);
  switch (tile.rows - row) {
    case 1: return run_rows<1>(tile, row);
    case 2: return run_rows<2>(tile, row);
    case 3: return run_rows<3>(tile, row);
    case 4: return run_rows<4>(tile, row);
    case 5: return run_rows<5>(tile, row);
    default: return;
  }
}

}  // namespace inferos::kernels::avx2
