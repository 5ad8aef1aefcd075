// Prefill attention with AVX-512: a block becomes f32 tiles once, then vfmadd231ps carries two small matrix products per tile.
//
// 6 query rows x 4 vectors (64 tokens for q k, 64 channels for p v) are 24 accumulators: latency 4 at two a cycle needs 8, and
// with 4 vectors of the tile and one broadcast the 32 registers are used without a spill. Per step 4 loads and 6 broadcasts
// feed 24 products, so the two load ports keep up. K is laid out with tokens as lanes, V with channels: again no horizontal sums.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attend_isa.hpp"
#include "kernels/avx512vnni/lanes.hpp"

namespace inferos::kernels::avx512vnni {
namespace {

constexpr std::size_t kT = kBlockTokens;
constexpr std::size_t kRows = 6;

struct Scales {  // fp16 -> f32, once per block
  alignas(64) float scale[kMaxHeadDim];
  alignas(64) float minimum[kMaxHeadDim];

  Scales(const std::byte* at, std::size_t n, bool minima) noexcept {
    for (std::size_t i = 0; i < n; i += 16) {
      _mm512_store_ps(scale + i, load_half(at + 2 * i));
      if (minima) _mm512_store_ps(minimum + i, load_half(at + 2 * (n + i)));
    }
  }
};

// Bits `shift`.. of every dword under `mask`, as float.
__m512 field(__m512i codes, unsigned shift, int mask) noexcept {
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(codes, shift), _mm512_set1_epi32(mask)));
}

void expand_f16(const BlockView& block, std::size_t d, TokenRange range, float* k, float* v) noexcept {
  for (std::size_t panel = 0; panel < kT / 16; ++panel) {
    const __mmask16 kept = lanes_of(range, panel);
    const std::byte* keys = block.data + 32 * panel * d;
    for (std::size_t c = 0; c < d; ++c) {
      // A small block has no bytes behind its last panel.
      const __m512 x = kept == 0 ? _mm512_setzero_ps() : load_half(keys + 32 * c);
      _mm512_storeu_ps(k + 16 * (panel * d + c), _mm512_maskz_mov_ps(kept, x));
    }
  }
  const std::byte* values = block.data + std::size_t{block.capacity} * d * 2;
  for (std::size_t i = range.lo * d; i < range.hi * d; i += 16) _mm512_storeu_ps(v + i, load_half(values + 2 * i));
}

void expand_k8(const std::byte* codes, const Scales& x, std::size_t d, TokenRange range, float* k) noexcept {
  for (std::size_t panel = 0; panel < kT / 16; ++panel) {
    const __mmask16 kept = lanes_of(range, panel);
    const std::byte* at = codes + panel / 2 * 32 * d + panel % 2 * 64;
    float* to = k + panel * 16 * d;
    for (std::size_t c = 0; c < d; c += 4, at += 128) {
      const __m512i four = _mm512_loadu_si512(at);
      for (unsigned j = 0; j < 4; ++j, to += 16) {
        const __m512 scale = _mm512_set1_ps(x.scale[c + j]);
        const __m512 minimum = _mm512_set1_ps(x.minimum[c + j]);
        _mm512_storeu_ps(to, _mm512_maskz_fmadd_ps(kept, scale, field(four, 8 * j, 255), minimum));
      }
    }
  }
}

void expand_k4(const std::byte* codes, const Scales& x, std::size_t d, TokenRange range, float* k) noexcept {
  for (std::size_t panel = 0; panel < kT / 16; ++panel) {
    const __mmask16 kept = lanes_of(range, panel);
    const std::byte* at = codes + panel / 2 * 16 * d + panel % 2 * 64;
    float* to = k + panel * 16 * d;
    for (std::size_t c = 0; c < d; c += 8, at += 128) {
      const __m512i eight = _mm512_loadu_si512(at);
      for (unsigned j = 0; j < 8; ++j, to += 16) {
        const __m512 scale = _mm512_set1_ps(x.scale[c + j]);
        const __m512 minimum = _mm512_set1_ps(x.minimum[c + j]);
        _mm512_storeu_ps(to, _mm512_maskz_fmadd_ps(kept, scale, field(eight, 8 * (j % 4) + (j / 4) * 4, 15), minimum));
      }
    }
  }
}

void expand_v8(const std::byte* codes, const Scales& x, std::size_t d, float* v) noexcept {
  for (std::size_t c = 0; c < d; c += 16) {
    for (std::size_t t = 0; t < kT; t += 4, codes += 64) {
      const __m512i four = _mm512_loadu_si512(codes);
      for (unsigned j = 0; j < 4; ++j) {
        const __m512i code = _mm512_srai_epi32(_mm512_slli_epi32(four, 24 - 8 * j), 24);
        _mm512_storeu_ps(v + (t + j) * d + c, _mm512_mul_ps(_mm512_set1_ps(x.scale[t + j]), _mm512_cvtepi32_ps(code)));
      }
    }
  }
}

void expand_v4(const std::byte* codes, const Scales& x, std::size_t d, float* v) noexcept {
  for (std::size_t c = 0; c < d; c += 16) {
    for (std::size_t t = 0; t < kT; t += 8, codes += 64) {
      const __m512i eight = _mm512_loadu_si512(codes);
      for (unsigned j = 0; j < 8; ++j) {
        const __m512 scale = _mm512_set1_ps(x.scale[t + j]);
        const __m512 minimum = _mm512_set1_ps(x.minimum[t + j]);
        _mm512_storeu_ps(v + (t + j) * d + c,
                         _mm512_fmadd_ps(scale, field(eight, 8 * (j % 4) + (j / 4) * 4, 15), minimum));
      }
    }
  }
}

struct Rows {  // of one register block
  const PrefillTile& tile;
  std::size_t first;
  TokenRange range[kRows];
  float alpha[kRows];
  alignas(64) float s[kRows][kT];

  Rows(const PrefillTile& of, std::size_t row) noexcept : tile(of), first(row), alpha{} {}
};

template <std::size_t R>
void logits(Rows& x) noexcept {
  const std::size_t d = x.tile.d;
  const float* q = x.tile.q + x.first * d;
  __m512 sum[R][4];
  for (std::size_t r = 0; r < R; ++r) {
    for (std::size_t j = 0; j < 4; ++j) sum[r][j] = _mm512_setzero_ps();
  }
  for (std::size_t c = 0; c < d; ++c) {
    __m512 k[4];
    for (std::size_t j = 0; j < 4; ++j) k[j] = _mm512_loadu_ps(x.tile.k + 16 * (j * d + c));
    for (std::size_t r = 0; r < R; ++r) {
      const __m512 qv = _mm512_set1_ps(q[r * d + c]);
      for (std::size_t j = 0; j < 4; ++j) sum[r][j] = _mm512_fmadd_ps(qv, k[j], sum[r][j]);
    }
  }
  const __m512 scale = _mm512_set1_ps(x.tile.scale);
  for (std::size_t r = 0; r < R; ++r) {
    for (std::size_t j = 0; j < 4; ++j) _mm512_store_ps(x.s[r] + 16 * j, _mm512_mul_ps(scale, sum[r][j]));
  }
}

template <std::size_t R, std::size_t kVectors>
void values(const Rows& x, std::size_t channel) noexcept {
  const std::size_t d = x.tile.d;
  float* o = x.tile.o + x.first * d + channel;
  __m512 sum[R][kVectors];
  for (std::size_t r = 0; r < R; ++r) {
    const __m512 alpha = _mm512_set1_ps(x.alpha[r]);
    for (std::size_t j = 0; j < kVectors; ++j) sum[r][j] = _mm512_mul_ps(_mm512_loadu_ps(o + r * d + 16 * j), alpha);
  }
  for (std::size_t t = x.tile.begin; t < x.tile.end; ++t) {
    __m512 v[kVectors];
    for (std::size_t j = 0; j < kVectors; ++j) v[j] = _mm512_loadu_ps(x.tile.v + t * d + channel + 16 * j);
    for (std::size_t r = 0; r < R; ++r) {
      const __m512 p = _mm512_set1_ps(x.s[r][t]);
      for (std::size_t j = 0; j < kVectors; ++j) sum[r][j] = _mm512_fmadd_ps(p, v[j], sum[r][j]);
    }
  }
  for (std::size_t r = 0; r < R; ++r) {
    if (x.range[r].lo >= x.range[r].hi) continue;  // left as it is
    for (std::size_t j = 0; j < kVectors; ++j) _mm512_storeu_ps(o + r * d + 16 * j, sum[r][j]);
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
  constexpr std::size_t kFirst = R < 4 ? R : (R + 1) / 2;  // softmax takes four rows at most
  softmax_step<kFirst>(x.s, x.range, tile.softcap, nullptr, tile.m + first, tile.l + first, x.alpha);
  if constexpr (R > kFirst) {
    softmax_step<R - kFirst>(x.s + kFirst, x.range + kFirst, tile.softcap, nullptr, tile.m + first + kFirst,
                             tile.l + first + kFirst, x.alpha + kFirst);
  }
  std::size_t channel = 0;
  for (; channel + 64 <= tile.d; channel += 64) values<R, 4>(x, channel);
  if ((tile.d - channel) / 32 != 0) {
    values<R, 2>(x, channel);
    channel += 32;
  }
  if (channel < tile.d) values<R, 1>(x, channel);
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

}  // namespace inferos::kernels::avx512vnni
