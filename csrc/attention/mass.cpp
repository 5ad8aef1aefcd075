#include "attention/mass.hpp"

#include <bit>
#include <cstdint>

#include "kernels/exp_constants.hpp"

namespace inferos::attention {
namespace {

using kernels::kBlockTokens;
using kernels::kExpFloor;

// Branch-free and without fma or rint, which the baseline has no vectors for. x is within kExpFloor..0.
float exp_of(float x) noexcept {
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it leaves no bits below 1
  const float y = x * kernels::kLog2e;
  const float n = (y + kRound) - kRound;
  const float f = y - n;
  float p = kernels::kExp2C5 + f * kernels::kExp2C6;
  p = kernels::kExp2C4 + f * p;
  p = kernels::kExp2C3 + f * p;
  p = kernels::kExp2C2 + f * p;
  p = kernels::kExp2C1 + f * p;
  p = 1.0F + f * p;
  return std::bit_cast<float>(std::bit_cast<std::int32_t>(p) + static_cast<std::int32_t>(n) * (1 << 23));
}

}  // namespace

void add_block_mass(const kernels::BlockView& block, const float* logits, std::size_t group, const float* top,
                    const float* weight, float* mass) noexcept {
  float sum[kBlockTokens] = {};
  for (std::size_t g = 0; g < group; ++g) {
    for (std::size_t t = 0; t < kBlockTokens; ++t) {
      const float x = logits[g * kBlockTokens + t] - top[g];
      const float p = exp_of(x > kExpFloor ? x : kExpFloor);
      sum[t] += x > kExpFloor ? p * weight[g] : 0.0F;
    }
  }
  for (std::size_t t = block.begin; t < block.end; ++t) mass[static_cast<std::size_t>(block.start) + t] += sum[t];
}

}  // namespace inferos::attention
