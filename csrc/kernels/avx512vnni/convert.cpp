// f32 <-> fp16 for AVX-512.
//
// vcvtps2ph and vcvtph2ps convert 16 values at a time, one per cycle or two (Zen 4: 2 micro-ops each), far above what memory
// delivers; they round, quieten NaN and treat subnormals exactly as the specification, whatever FTZ says. Tails are masked.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/tables.hpp"

namespace inferos::kernels::avx512vnni {
namespace {

constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

__mmask16 first(std::size_t n) noexcept { return static_cast<__mmask16>(n >= 16 ? 0xFFFFU : (1U << n) - 1U); }

// min and max return their second operand where one is NaN, so NaN passes through.
template <bool kSaturate>
__m256i narrow(__m512 v) noexcept {
  if constexpr (kSaturate) {
    v = _mm512_max_ps(_mm512_set1_ps(-65504.0F), _mm512_min_ps(_mm512_set1_ps(65504.0F), v));
  }
  return _mm512_cvtps_ph(v, kNearest);
}

template <bool kSaturate>
void to_f16(const float* x, std::size_t n, std::uint16_t* y) noexcept {
  std::size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), narrow<kSaturate>(_mm512_loadu_ps(x + i)));
  }
  if (i < n) {
    const __mmask16 mask = first(n - i);
    _mm256_mask_storeu_epi16(y + i, mask, narrow<kSaturate>(_mm512_maskz_loadu_ps(mask, x + i)));
  }
}

void to_f32(const std::uint16_t* x, std::size_t n, float* y) noexcept {
  std::size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    _mm512_storeu_ps(y + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));
  }
  if (i < n) {
    const __mmask16 mask = first(n - i);
    _mm512_mask_storeu_ps(y + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x + i)));
  }
}

}  // namespace

const Convert kConvert{Isa::kAvx512Vnni, to_f16<false>, to_f16<true>, to_f32};

}  // namespace inferos::kernels::avx512vnni
