// The key panels for AVX2 with F16C: 8 channels of 16 tokens, in eight registers.
//
// Tokens t and t + 8 share a register, so the three stages of vpunpck (1 to 2 per cycle, 8 each) transpose two 8 x 8 tiles of fp16 and
// leave whole 32-byte lines of the panel, with no step across 128-bit lanes; the way back is the same network. 40 shuffles and
// inserts for 128 values: about 4 values a cycle, more than the rows come in at.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/tables.hpp"

namespace inferos::kernels::avx2 {
namespace {

constexpr std::size_t kPanelTokens = 16;
constexpr std::size_t kSide = 8;

// In each 128-bit lane: value j of vector i <-> value i of vector j.
void transpose(__m256i (&v)[kSide]) noexcept {
  __m256i pairs[kSide];  // two values of a column side by side, columns 0..3 then 4..7
  for (std::size_t i = 0; i < 4; ++i) {
    pairs[i] = _mm256_unpacklo_epi16(v[2 * i], v[2 * i + 1]);
    pairs[4 + i] = _mm256_unpackhi_epi16(v[2 * i], v[2 * i + 1]);
  }
  for (std::size_t half = 0; half < kSide; half += 4) {
    const __m256i a = _mm256_unpacklo_epi32(pairs[half], pairs[half + 1]);
    const __m256i b = _mm256_unpacklo_epi32(pairs[half + 2], pairs[half + 3]);
    const __m256i c = _mm256_unpackhi_epi32(pairs[half], pairs[half + 1]);
    const __m256i e = _mm256_unpackhi_epi32(pairs[half + 2], pairs[half + 3]);
    v[half] = _mm256_unpacklo_epi64(a, b);
    v[half + 1] = _mm256_unpackhi_epi64(a, b);
    v[half + 2] = _mm256_unpacklo_epi64(c, e);
    v[half + 3] = _mm256_unpackhi_epi64(c, e);
  }
}

// Saturates; min and max return their second operand where one is NaN, so NaN passes through.
__m128i narrow(const float* x) noexcept {
  const __m256 v =
      _mm256_max_ps(_mm256_set1_ps(-65504.0F), _mm256_min_ps(_mm256_set1_ps(65504.0F), _mm256_loadu_ps(x)));
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

void store(const float* rows, std::size_t stride, std::size_t d, std::uint16_t* panel) noexcept {
  for (std::size_t c = 0; c < d;
       c += 2 * kSide) {  // a whole line of each row: where rows are 4 KiB apart, L1 holds it only once
    __m256i v[kSide];
    __m256i w[kSide];
    for (std::size_t t = 0; t < kSide; ++t) {
      const float* low = rows + t * stride + c;
      const float* high = rows + (t + kSide) * stride + c;
      v[t] = _mm256_set_m128i(narrow(high), narrow(low));
      w[t] = _mm256_set_m128i(narrow(high + kSide), narrow(low + kSide));
    }
    auto* to = reinterpret_cast<__m256i*>(panel + c * kPanelTokens);
    transpose(v);
    for (std::size_t i = 0; i < kSide; ++i) _mm256_storeu_si256(to + i, v[i]);
    transpose(w);
    for (std::size_t i = 0; i < kSide; ++i) _mm256_storeu_si256(to + kSide + i, w[i]);
  }
}

void load(const std::uint16_t* panel, std::size_t d, std::uint16_t* rows) noexcept {
  for (std::size_t c = 0; c < d; c += kSide) {
    const auto* from = reinterpret_cast<const __m256i*>(panel + c * kPanelTokens);
    __m256i v[kSide];
    for (std::size_t i = 0; i < kSide; ++i) v[i] = _mm256_loadu_si256(from + i);
    transpose(v);
    for (std::size_t t = 0; t < kSide; ++t) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(rows + t * d + c), _mm256_castsi256_si128(v[t]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(rows + (t + kSide) * d + c), _mm256_extracti128_si256(v[t], 1));
    }
  }
}

}  // namespace

const Panels kPanels{Isa::kAvx2, store, load};

}  // namespace inferos::kernels::avx2
