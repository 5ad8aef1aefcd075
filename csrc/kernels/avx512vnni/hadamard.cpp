// The rotation for AVX-512: a chunk of 16..128 channels stays in 1..8 registers from load to store.
//
// The stages within a register are one shuffle (vpermilps, vshuff32x4: 1 per cycle on Zen 4) and one vfmadd231ps: with the signs
// +1 -1 per lane, partner + sign * self is a + b in the lower place and a - b in the upper one, rounded once as the sum is.
// The stages across registers are plain vaddps and vsubps. Loads and stores are the bound from L2 on.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/tables.hpp"

namespace inferos::kernels::avx512vnni {
namespace {

struct Signs {
  __m512 at1, at2, at4, at8;  // +1 where the lane's index has the bit clear, -1 where it is set
};

__m512 signs(__mmask16 negative) noexcept {
  return _mm512_mask_mov_ps(_mm512_set1_ps(1.0F), negative, _mm512_set1_ps(-1.0F));
}

__m512 within(__m512 v, const Signs& s) noexcept {
  v = _mm512_fmadd_ps(v, s.at1, _mm512_permute_ps(v, 0xB1));
  v = _mm512_fmadd_ps(v, s.at2, _mm512_permute_ps(v, 0x4E));
  v = _mm512_fmadd_ps(v, s.at4, _mm512_shuffle_f32x4(v, v, 0xB1));
  return _mm512_fmadd_ps(v, s.at8, _mm512_shuffle_f32x4(v, v, 0x4E));
}

template <std::size_t kRegisters>
void rotate_chunks(float* x, std::size_t chunks, float scale) noexcept {
  const Signs s{signs(0xAAAA), signs(0xCCCC), signs(0xF0F0), signs(0xFF00)};
  const __m512 factor = _mm512_set1_ps(scale);
  for (std::size_t n = 0; n < chunks; ++n, x += kRegisters * 16) {
    __m512 v[kRegisters];
    for (std::size_t i = 0; i < kRegisters; ++i) v[i] = within(_mm512_loadu_ps(x + i * 16), s);
    for (std::size_t h = 1; h < kRegisters; h *= 2) {
      for (std::size_t i = 0; i < kRegisters; ++i) {
        if ((i & h) != 0) continue;
        const __m512 a = v[i];
        const __m512 b = v[i + h];
        v[i] = _mm512_add_ps(a, b);
        v[i + h] = _mm512_sub_ps(a, b);
      }
    }
    for (std::size_t i = 0; i < kRegisters; ++i) _mm512_storeu_ps(x + i * 16, _mm512_mul_ps(v[i], factor));
  }
}

void rotate(float* x, std::size_t rows, std::size_t d) noexcept {
  if (d % 128 == 0) {
    rotate_chunks<8>(x, rows * d / 128, 0x1.6a09e6p-4F);
  } else if (d % 64 == 0) {
    rotate_chunks<4>(x, rows * d / 64, 0x1p-3F);
  } else if (d % 32 == 0) {
    rotate_chunks<2>(x, rows * d / 32, 0x1.6a09e6p-3F);
  } else {
    rotate_chunks<1>(x, rows * d / 16, 0x1p-2F);
  }
}

}  // namespace

const Hadamard kHadamard{Isa::kAvx512Vnni, rotate};

}  // namespace inferos::kernels::avx512vnni
