// What a sampler asks of a row of logits, for AVX-512. Four vectors at a time, 64 lanes.
//
// largest is one load and one vmaxps per 16 logits: what L2 delivers. weigh is twelve micro-ops per 16 logits, six of them multiply-adds, of
// which Zen 4 and later do two per cycle (4 pipes in all): three cycles. The comparison that drops a term costs no operation of its own,
// since the last multiply-add is masked, and it drops NaN as well; vmaxps does so in its first operand. at_least is one comparison per
// 16 logits, and vpcompressd where one holds, which is rare.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attend_isa.hpp"
#include "kernels/avx512vnni/lanes.hpp"
#include "kernels/logits_chunks.hpp"
#include "kernels/tables.hpp"

namespace inferos::kernels::avx512vnni {
namespace {

constexpr std::size_t kStride = 64;

__mmask16 finite(__m512 x) noexcept { return _mm512_cmp_ps_mask(_mm512_sub_ps(x, x), _mm512_setzero_ps(), _CMP_EQ_OQ); }

float largest_of(const float* x) noexcept {
  __m512 top[4];
  for (std::size_t j = 0; j < 4; ++j) top[j] = _mm512_set1_ps(kMinusInfinity);
  for (std::size_t i = 0; i < kLogitsChunk; i += kStride) {
    for (std::size_t j = 0; j < 4; ++j) top[j] = _mm512_max_ps(_mm512_loadu_ps(x + i + j * 16), top[j]);
  }
  const __m512 all[1] = {_mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]))};
  return _mm_cvtss_f32(across<Largest>(all));
}

float weigh_of(const float* x, float top, float inverse_temperature) noexcept {
  const __m512 tops = _mm512_set1_ps(top);
  const __m512 c = _mm512_set1_ps(inverse_temperature * kEighths);
  const __m512 lowest = _mm512_set1_ps(kWeighLowest / (inverse_temperature * kEighths));
  const __m512 rint = _mm512_set1_ps(kWeighRint);
  const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kWeighTable)));
  __m512 sum[4];
  for (std::size_t j = 0; j < 4; ++j) sum[j] = _mm512_setzero_ps();
  for (std::size_t i = 0; i < kLogitsChunk; i += kStride) {
    for (std::size_t j = 0; j < 4; ++j) {
      const __m512 d = _mm512_sub_ps(_mm512_loadu_ps(x + i + j * 16), tops);
      const __m512 t = _mm512_fmadd_ps(d, c, rint);
      const __m512 r = _mm512_fmsub_ps(d, c, _mm512_sub_ps(t, rint));
      __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(kWeighC3), r, _mm512_set1_ps(kWeighC2));
      p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kWeighC1));
      p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0F));
      const __m512i bits = _mm512_castps_si512(t);
      const __m512i power = _mm512_add_epi32(_mm512_permutexvar_epi32(bits, table), _mm512_slli_epi32(bits, 20));
      sum[j] = _mm512_mask3_fmadd_ps(p, _mm512_castsi512_ps(power), sum[j], _mm512_cmp_ps_mask(d, lowest, _CMP_GE_OQ));
    }
  }
  const __m512 all[1] = {_mm512_add_ps(_mm512_add_ps(sum[0], sum[2]), _mm512_add_ps(sum[1], sum[3]))};
  return _mm_cvtss_f32(across<Sum>(all));
}

std::size_t at_least(const float* x, std::size_t n, float threshold, std::int32_t* positions) noexcept {
  const __m512 bound = _mm512_set1_ps(threshold);
  __m512i position = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  std::size_t count = 0;
  for (std::size_t i = 0; i < n; i += 16, position = _mm512_add_epi32(position, _mm512_set1_epi32(16))) {
    const auto here = static_cast<__mmask16>(n - i >= 16 ? 0xFFFFU : (1U << (n - i)) - 1U);
    const __m512 v = _mm512_maskz_loadu_ps(here, x + i);
    const __mmask16 above = _mm512_mask_cmp_ps_mask(here, v, bound, _CMP_GE_OQ);
    if (above == 0) continue;
    const auto kept = static_cast<__mmask16>(above & finite(v));
    const auto found = static_cast<unsigned>(_mm_popcnt_u32(kept));
    const auto used = static_cast<__mmask16>((1U << found) - 1U);
    _mm512_mask_storeu_epi32(positions + count, used, _mm512_maskz_compress_epi32(kept, position));
    count += found;
  }
  return count;
}

}  // namespace

const Logits kLogits{Isa::kAvx512Vnni, largest_by_chunks<largest_of>, weigh_by_chunks<weigh_of>, at_least};

}  // namespace inferos::kernels::avx512vnni
