// Reading memory for AVX2.
//
// Two 32-byte loads and exclusive ors a cycle at most; memory delivers a tenth of that, so four independent sums are plenty.
// The stream is sequential: the processor's own prefetchers reach the same rate as software prefetch at any distance (measured).

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/tables.hpp"

namespace inferos::kernels::avx2 {
namespace {

__m256i load(const std::byte* p) noexcept { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

std::uint64_t fold(const std::byte* p, std::size_t n) noexcept {
  __m256i a = _mm256_setzero_si256();
  __m256i b = a;
  __m256i c = a;
  __m256i d = a;
  for (std::size_t i = 0; i < n; i += 128) {
    a = _mm256_xor_si256(a, load(p + i));
    b = _mm256_xor_si256(b, load(p + i + 32));
    c = _mm256_xor_si256(c, load(p + i + 64));
    d = _mm256_xor_si256(d, load(p + i + 96));
  }
  a = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
  const __m128i two = _mm_xor_si128(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  const __m128i one = _mm_xor_si128(two, _mm_unpackhi_epi64(two, two));
  return static_cast<std::uint64_t>(_mm_cvtsi128_si64(one));
}

}  // namespace

const Read kRead{Isa::kAvx2, fold};

}  // namespace inferos::kernels::avx2
