// Scalar specification of the rotation: the textbook butterfly, one chunk at a time.

#include "kernels/tables.hpp"

namespace inferos::kernels::scalar {
namespace {

// The float nearest 1/sqrt(n) for n = 16, 32, 64, 128.
float norm(std::size_t n) noexcept {
  switch (n) {
    case 16: return 0x1p-2F;
    case 32: return 0x1.6a09e6p-3F;
    case 64: return 0x1p-3F;
    default: return 0x1.6a09e6p-4F;
  }
}

void rotate(float* x, std::size_t rows, std::size_t d) noexcept {
  const std::size_t n = hadamard_size(d);
  const float scale = norm(n);
  for (float* chunk = x; chunk != x + rows * d; chunk += n) {
    for (std::size_t h = 1; h < n; h *= 2) {
      for (std::size_t i = 0; i < n; ++i) {
        if ((i & h) != 0) continue;
        const float a = chunk[i];
        const float b = chunk[i + h];
        chunk[i] = a + b;
        chunk[i + h] = a - b;
      }
    }
    for (std::size_t i = 0; i < n; ++i) chunk[i] *= scale;
  }
}

}  // namespace

const Hadamard kHadamard{Isa::kScalar, rotate};

}  // namespace inferos::kernels::scalar
