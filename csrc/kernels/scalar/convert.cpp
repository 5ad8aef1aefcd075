// Scalar specification of f32 <-> fp16. The rules are those of core/fp16.hpp.

#include "core/fp16.hpp"
#include "kernels/tables.hpp"

namespace inferos::kernels::scalar {
namespace {

void f32_to_f16_n(const float* x, std::size_t n, std::uint16_t* y) noexcept {
  for (std::size_t i = 0; i < n; ++i) y[i] = f32_to_f16(x[i]);
}

void f32_to_f16_saturate_n(const float* x, std::size_t n, std::uint16_t* y) noexcept {
  for (std::size_t i = 0; i < n; ++i) y[i] = f32_to_f16_saturate(x[i]);
}

void f16_to_f32_n(const std::uint16_t* x, std::size_t n, float* y) noexcept {
  for (std::size_t i = 0; i < n; ++i) y[i] = f16_to_f32(x[i]);
}

}  // namespace

const Convert kConvert{Isa::kScalar, f32_to_f16_n, f32_to_f16_saturate_n, f16_to_f32_n};

}  // namespace inferos::kernels::scalar
