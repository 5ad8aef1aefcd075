// Reading memory for AVX-512.
//
// One 64-byte load and exclusive or a cycle at least; memory delivers a tenth of that, so four independent sums are plenty.
// The stream is sequential: the processor's own prefetchers reach the same rate as software prefetch at any distance (measured).

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/tables.hpp"

namespace inferos::kernels::avx512vnni {
namespace {

std::uint64_t fold(const std::byte* p, std::size_t n) noexcept {
  __m512i a = _mm512_setzero_si512();
  __m512i b = a;
  __m512i c = a;
  __m512i d = a;
  for (std::size_t i = 0; i < n; i += 256) {
    a = _mm512_xor_si512(a, _mm512_load_si512(p + i));
    b = _mm512_xor_si512(b, _mm512_load_si512(p + i + 64));
    c = _mm512_xor_si512(c, _mm512_load_si512(p + i + 128));
    d = _mm512_xor_si512(d, _mm512_load_si512(p + i + 192));
  }
  a = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
  const __m256i four = _mm256_xor_si256(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  const __m128i two = _mm_xor_si128(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
  const __m128i one = _mm_xor_si128(two, _mm_unpackhi_epi64(two, two));
  return static_cast<std::uint64_t>(_mm_cvtsi128_si64(one));
}

}  // namespace

const Read kRead{Isa::kAvx512Vnni, fold};

}  // namespace inferos::kernels::avx512vnni
