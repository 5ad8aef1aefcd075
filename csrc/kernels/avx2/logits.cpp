// What a sampler asks of a row of logits, for AVX2. Eight vectors at a time, 64 lanes: more would leave exp no registers.
//
// largest is one load and one vmaxps per 8 logits; weigh is fifteen micro-ops per 8 logits, six of them multiply-adds, two per cycle. The
// comparison that drops a term drops NaN as well; vmaxps does so in its first operand. at_least is one comparison per 8 logits; the few
// that hold are listed bit by bit.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attend_isa.hpp"
#include "kernels/avx2/lanes.hpp"
#include "kernels/logits_chunks.hpp"
#include "kernels/tables.hpp"

namespace inferos::kernels::avx2 {
namespace {

constexpr std::size_t kStride = 64;
constexpr std::size_t kVectors = kStride / 8;

float largest_of(const float* x) noexcept {
  __m256 top[4];
  for (std::size_t j = 0; j < 4; ++j) top[j] = _mm256_set1_ps(kMinusInfinity);
  for (std::size_t i = 0; i < kLogitsChunk; i += 32) {
    for (std::size_t j = 0; j < 4; ++j) top[j] = _mm256_max_ps(_mm256_loadu_ps(x + i + j * 8), top[j]);
  }
  return largest8(_mm256_max_ps(_mm256_max_ps(top[0], top[1]), _mm256_max_ps(top[2], top[3])));
}

float weigh_of(const float* x, float top, float inverse_temperature) noexcept {
  const __m256 tops = _mm256_set1_ps(top);
  const __m256 c = _mm256_set1_ps(inverse_temperature * kEighths);
  const __m256 lowest = _mm256_set1_ps(kWeighLowest / (inverse_temperature * kEighths));
  const __m256 rint = _mm256_set1_ps(kWeighRint);
  const __m256i table = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kWeighTable));
  __m256 sum[kVectors];
  for (std::size_t j = 0; j < kVectors; ++j) sum[j] = _mm256_setzero_ps();
  for (std::size_t i = 0; i < kLogitsChunk; i += kStride) {
    for (std::size_t j = 0; j < kVectors; ++j) {
      const __m256 d = _mm256_sub_ps(_mm256_loadu_ps(x + i + j * 8), tops);
      const __m256 t = _mm256_fmadd_ps(d, c, rint);
      const __m256 r = _mm256_fmsub_ps(d, c, _mm256_sub_ps(t, rint));
      __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(kWeighC3), r, _mm256_set1_ps(kWeighC2));
      p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kWeighC1));
      p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0F));
      const __m256i bits = _mm256_castps_si256(t);
      const __m256i power = _mm256_add_epi32(_mm256_permutevar8x32_epi32(table, bits), _mm256_slli_epi32(bits, 20));
      // Both factors are cleared: a product of 0 and an infinity would be NaN.
      const __m256 kept = _mm256_cmp_ps(d, lowest, _CMP_GE_OQ);
      sum[j] = _mm256_fmadd_ps(_mm256_and_ps(p, kept), _mm256_and_ps(_mm256_castsi256_ps(power), kept), sum[j]);
    }
  }
  for (std::size_t j = 0; j < 4; ++j) sum[j] = _mm256_add_ps(sum[j], sum[j + 4]);
  return reduce16(_mm256_add_ps(sum[0], sum[2]), _mm256_add_ps(sum[1], sum[3]));
}

std::size_t at_least(const float* x, std::size_t n, float threshold, std::int32_t* positions) noexcept {
  const __m256 bound = _mm256_set1_ps(threshold);
  std::size_t count = 0;
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    const int above = _mm256_movemask_ps(_mm256_cmp_ps(v, bound, _CMP_GE_OQ));
    if (above == 0) continue;
    const __m256 finite = _mm256_cmp_ps(_mm256_sub_ps(v, v), _mm256_setzero_ps(), _CMP_EQ_OQ);
    const int kept = above & _mm256_movemask_ps(finite);
    for (int j = 0; j < 8; ++j) {
      if ((kept >> j & 1) != 0) positions[count++] = static_cast<std::int32_t>(i) + j;
    }
  }
  for (; i < n; ++i) {
    if (x[i] >= threshold && x[i] - x[i] == 0.0F) positions[count++] = static_cast<std::int32_t>(i);
  }
  return count;
}

}  // namespace

const Logits kLogits{Isa::kAvx2, largest_by_chunks<largest_of>, weigh_by_chunks<weigh_of>, at_least};

}  // namespace inferos::kernels::avx2
