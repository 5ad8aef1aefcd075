#pragma once
// The rotation of V before INT4: an orthonormal Walsh-Hadamard transform over chunks of n = min(128, the largest power of two
// that divides head_dim) channels, block-diagonal. It is its own inverse up to rounding.
//
// For h = 1, 2, 4 .. n/2: (a, b) at distance h -> (a + b, a - b); then every value times the float nearest 1/sqrt(n). In f32; the order of
// stages is fixed, so all ISAs return the same bits. Source of the idea: QuaRot, https://arxiv.org/abs/2404.00456.

#include <cstddef>
#include <span>

#include "core/cpu.hpp"

namespace inferos::kernels {

constexpr std::size_t hadamard_size(std::size_t d) noexcept {
  std::size_t n = d & (~d + 1);
  return n > 128 ? 128 : n;
}

struct Hadamard {
  Isa isa;
  // x[rows][d] in place; d a valid head_dim.
  void (*rotate)(float* x, std::size_t rows, std::size_t d) noexcept;
};

std::span<const Hadamard> hadamard_runnable();
const Hadamard& hadamard();

}  // namespace inferos::kernels
