// The importance loops for AVX2 with F16C: a block is eight vectors; the rest of a short one goes through a buffer.
//
// fold is a load, two conversions, two vmulps and a vaddps per 8 tokens, each one per cycle or two. heaviest avoids sorting 64 values: the
// eight maxima of every eighth value are eight values, so the smallest of them bounds the eighth largest, and about a dozen values reach it.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/block.hpp"
#include "kernels/tables.hpp"

namespace inferos::kernels::avx2 {
namespace {

constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

__m256 widen(const std::uint16_t* x) noexcept {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

void fold8(std::uint16_t* average, const float* mass, __m256 keep, __m256 add) noexcept {
  const __m256 received = _mm256_max_ps(_mm256_loadu_ps(mass), _mm256_setzero_ps());  // NaN: the second
  const __m256 sum = _mm256_add_ps(_mm256_mul_ps(widen(average), keep), _mm256_mul_ps(received, add));
  const __m256 bounded = _mm256_min_ps(_mm256_set1_ps(65504.0F), sum);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(average), _mm256_cvtps_ph(bounded, kNearest));
}

void fold(std::uint16_t* average, const float* mass, std::size_t n, float keep, float add) noexcept {
  const __m256 keeps = _mm256_set1_ps(keep);
  const __m256 adds = _mm256_set1_ps(add);
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) fold8(average + i, mass + i, keeps, adds);
  if (i == n) return;
  std::uint16_t halves[8] = {};
  float received[8] = {};
  for (std::size_t j = 0; i + j < n; ++j) {
    halves[j] = average[i + j];
    received[j] = mass[i + j];
  }
  fold8(halves, received, keeps, adds);
  for (std::size_t j = 0; i + j < n; ++j) average[i + j] = halves[j];
}

double heaviest(const std::uint16_t* average, const std::uint16_t* norm, std::size_t n) noexcept {
  alignas(32) float products[kBlockTokens] = {};
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_store_ps(products + i, _mm256_mul_ps(widen(average + i), widen(norm + i)));
  for (; i < n; ++i) products[i] = _cvtsh_ss(average[i]) * _cvtsh_ss(norm[i]);
  __m256 eight = _mm256_load_ps(products);
  for (std::size_t j = 8; j < kBlockTokens; j += 8) eight = _mm256_max_ps(eight, _mm256_load_ps(products + j));
  __m128 least = _mm_min_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  least = _mm_min_ps(least, _mm_movehl_ps(least, least));
  least = _mm_min_ss(least, _mm_movehdup_ps(least));
  const float bound = _mm_cvtss_f32(least);
  float values[kBlockTokens];
  std::size_t count = 0;
  for (const float product : products) {  // no branch to mispredict
    values[count] = product;
    count += product >= bound ? 1U : 0U;
  }
  return sum_of_heaviest(values, count);
}

}  // namespace

const Importance kImportance{Isa::kAvx2, fold, heaviest};

}  // namespace inferos::kernels::avx2
