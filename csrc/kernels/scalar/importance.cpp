// Scalar specification of the importance loops.

#include "core/fp16.hpp"
#include "kernels/block.hpp"
#include "kernels/tables.hpp"

namespace inferos::kernels::scalar {
namespace {

void fold(std::uint16_t* average, const float* mass, std::size_t n, float keep, float add) noexcept {
  for (std::size_t i = 0; i < n; ++i) {
    const float received = mass[i] > 0.0F ? mass[i] : 0.0F;
    average[i] = f32_to_f16_saturate(f16_to_f32(average[i]) * keep + received * add);
  }
}

double heaviest(const std::uint16_t* average, const std::uint16_t* norm, std::size_t n) noexcept {
  float products[kBlockTokens];
  for (std::size_t i = 0; i < n; ++i) products[i] = f16_to_f32(average[i]) * f16_to_f32(norm[i]);
  return sum_of_heaviest(products, n);
}

}  // namespace

const Importance kImportance{Isa::kScalar, fold, heaviest};

}  // namespace inferos::kernels::scalar
