// The importance loops for AVX-512: a block is four vectors, the last one masked where it is short.
//
// fold is a load, two conversions, two vmulps and a vaddps per 16 tokens, each one per cycle or two: what L2 delivers. heaviest avoids
// sorting 64 values: the eight maxima of every eighth value are eight values, so the smallest of them bounds the eighth largest, and about a
// dozen values reach it. vpcompressd (2 micro-ops, to a register: to memory it is slow on Zen 4) lines those up for a short insertion.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/block.hpp"
#include "kernels/tables.hpp"

namespace inferos::kernels::avx512vnni {
namespace {

constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

__mmask16 tokens_of(std::size_t i, std::size_t n) noexcept {
  return static_cast<__mmask16>(n >= i + 16 ? 0xFFFFU : n <= i ? 0U : (1U << (n - i)) - 1U);
}

__m512 widen(__mmask16 here, const std::uint16_t* x) noexcept {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(here, x));
}

void fold(std::uint16_t* average, const float* mass, std::size_t n, float keep, float add) noexcept {
  const __m512 keeps = _mm512_set1_ps(keep);
  const __m512 adds = _mm512_set1_ps(add);
  for (std::size_t i = 0; i < n; i += 16) {
    const __mmask16 here = tokens_of(i, n);
    const __m512 received =
        _mm512_max_ps(_mm512_maskz_loadu_ps(here, mass + i), _mm512_setzero_ps());  // NaN: the second
    const __m512 sum = _mm512_add_ps(_mm512_mul_ps(widen(here, average + i), keeps), _mm512_mul_ps(received, adds));
    const __m512 bounded = _mm512_min_ps(_mm512_set1_ps(65504.0F), sum);
    _mm256_mask_storeu_epi16(average + i, here, _mm512_cvtps_ph(bounded, kNearest));
  }
}

double heaviest(const std::uint16_t* average, const std::uint16_t* norm, std::size_t n) noexcept {
  __m512 product[4];
  for (std::size_t j = 0; j < 4; ++j) {
    const __mmask16 here = tokens_of(16 * j, n);
    product[j] = _mm512_setzero_ps();
    if (here != 0) product[j] = _mm512_mul_ps(widen(here, average + 16 * j), widen(here, norm + 16 * j));
  }
  const __m512 most = _mm512_max_ps(_mm512_max_ps(product[0], product[1]), _mm512_max_ps(product[2], product[3]));
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(most), _mm512_extractf32x8_ps(most, 1));
  __m128 least = _mm_min_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  least = _mm_min_ps(least, _mm_movehl_ps(least, least));
  least = _mm_min_ss(least, _mm_movehdup_ps(least));
  const __m512 bound = _mm512_broadcastss_ps(least);
  alignas(64) float values[kBlockTokens + 16];
  std::size_t count = 0;
  for (const __m512& vector : product) {
    const __mmask16 reached = _mm512_cmp_ps_mask(vector, bound, _CMP_GE_OQ);
    _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(reached, vector));
    count += static_cast<unsigned>(_mm_popcnt_u32(reached));
  }
  return sum_of_heaviest(values, count);
}

}  // namespace

const Importance kImportance{Isa::kAvx512Vnni, fold, heaviest};

}  // namespace inferos::kernels::avx512vnni
