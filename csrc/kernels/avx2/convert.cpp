// f32 <-> fp16 for AVX2 with F16C.
//
// vcvtps2ph and vcvtph2ps convert 8 values at a time, one per cycle, above what memory delivers; they round, quieten NaN and
// treat subnormals exactly as the specification. Tails go through a buffer of one vector, so nothing is read beyond the end.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/tables.hpp"

namespace inferos::kernels::avx2 {
namespace {

constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// min and max return their second operand where one is NaN, so NaN passes through.
template <bool kSaturate>
void narrow8(const float* x, std::uint16_t* y) noexcept {
  __m256 v = _mm256_loadu_ps(x);
  if constexpr (kSaturate) {
    v = _mm256_max_ps(_mm256_set1_ps(-65504.0F), _mm256_min_ps(_mm256_set1_ps(65504.0F), v));
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm256_cvtps_ph(v, kNearest));
}

void widen8(const std::uint16_t* x, float* y) noexcept {
  _mm256_storeu_ps(y, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}

template <class From, class To, void (*kEight)(const From*, To*) noexcept>
void all(const From* x, std::size_t n, To* y) noexcept {
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) kEight(x + i, y + i);
  if (i == n) return;
  From in[8] = {};
  To out[8];
  for (std::size_t j = 0; i + j < n; ++j) in[j] = x[i + j];
  kEight(in, out);
  for (std::size_t j = 0; i + j < n; ++j) y[i + j] = out[j];
}

}  // namespace

const Convert kConvert{Isa::kAvx2, all<float, std::uint16_t, narrow8<false>>, all<float, std::uint16_t, narrow8<true>>,
                       all<std::uint16_t, float, widen8>};

}  // namespace inferos::kernels::avx2
