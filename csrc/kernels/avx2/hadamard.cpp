// The rotation for AVX2 with FMA: a chunk of 16..64 channels stays in 2..8 registers from load to store. One of 128 would need all sixteen
// and leave none for signs and factor, so it is two of 64 that meet in a last stage.
//
// The stages within a register are one shuffle (vpermilps 1 per cycle, vperm2f128 3 cycles of latency but pipelined) and one
// vfmadd231ps: with the signs +1 -1 per lane, partner + sign * self is a + b in the lower place and a - b in the upper one,
// rounded once as the sum is. The stages across registers are plain vaddps and vsubps.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/tables.hpp"

namespace inferos::kernels::avx2 {
namespace {

struct Signs {
  __m256 at1, at2, at4;  // +1 where the lane's index has the bit clear, -1 where it is set
};

__m256 within(__m256 v, const Signs& s) noexcept {
  v = _mm256_fmadd_ps(v, s.at1, _mm256_permute_ps(v, 0xB1));
  v = _mm256_fmadd_ps(v, s.at2, _mm256_permute_ps(v, 0x4E));
  return _mm256_fmadd_ps(v, s.at4, _mm256_permute2f128_ps(v, v, 0x01));
}

Signs all_signs() noexcept {
  return {_mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1),
          _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1)};
}

template <std::size_t kRegisters>
void rotate_chunks(float* x, std::size_t chunks, float scale) noexcept {
  const Signs s = all_signs();
  const __m256 factor = _mm256_set1_ps(scale);
  for (std::size_t n = 0; n < chunks; ++n, x += kRegisters * 8) {
    __m256 v[kRegisters];
    for (std::size_t i = 0; i < kRegisters; ++i) v[i] = within(_mm256_loadu_ps(x + i * 8), s);
    for (std::size_t h = 1; h < kRegisters; h *= 2) {
      for (std::size_t i = 0; i < kRegisters; ++i) {
        if ((i & h) != 0) continue;
        const __m256 a = v[i];
        const __m256 b = v[i + h];
        v[i] = _mm256_add_ps(a, b);
        v[i + h] = _mm256_sub_ps(a, b);
      }
    }
    for (std::size_t i = 0; i < kRegisters; ++i) _mm256_storeu_ps(x + i * 8, _mm256_mul_ps(v[i], factor));
  }
}

// Chunks of 128. A factor of 1 is exact.
void rotate_halves(float* x, std::size_t chunks, float scale) noexcept {
  constexpr std::size_t kHalf = 64;
  const __m256 factor = _mm256_set1_ps(scale);
  for (std::size_t n = 0; n < chunks; ++n, x += 2 * kHalf) {
    rotate_chunks<kHalf / 8>(x, 2, 1.0F);
    for (std::size_t i = 0; i < kHalf; i += 8) {
      const __m256 a = _mm256_loadu_ps(x + i);
      const __m256 b = _mm256_loadu_ps(x + kHalf + i);
      _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_add_ps(a, b), factor));
      _mm256_storeu_ps(x + kHalf + i, _mm256_mul_ps(_mm256_sub_ps(a, b), factor));
    }
  }
}

void rotate(float* x, std::size_t rows, std::size_t d) noexcept {
  if (d % 128 == 0) {
    rotate_halves(x, rows * d / 128, 0x1.6a09e6p-4F);
  } else if (d % 64 == 0) {
    rotate_chunks<8>(x, rows * d / 64, 0x1p-3F);
  } else if (d % 32 == 0) {
    rotate_chunks<4>(x, rows * d / 32, 0x1.6a09e6p-3F);
  } else {
    rotate_chunks<2>(x, rows * d / 16, 0x1p-2F);
  }
}

}  // namespace

const Hadamard kHadamard{Isa::kAvx2, rotate};

}  // namespace inferos::kernels::avx2
