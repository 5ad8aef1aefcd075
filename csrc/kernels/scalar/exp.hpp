#pragma once
// exp and tanh of attend.hpp in plain floats. Also for callers that merge partial results: the same bits as inside the kernels.

#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/exp_constants.hpp"

namespace inferos::kernels::scalar {

// x <= 0; NaN stays NaN.
inline float exp_nonpositive(float x) noexcept {
  if (std::isnan(x)) return x;
  if (x < kExpFloor) return 0.0F;
  const float n = std::nearbyint(x * kLog2e);
  const float f = std::fma(x, kLog2eLow, std::fma(x, kLog2e, -n));
  float p = std::fma(kExp2C6, f, kExp2C5);
  p = std::fma(p, f, kExp2C4);
  p = std::fma(p, f, kExp2C3);
  p = std::fma(p, f, kExp2C2);
  p = std::fma(p, f, kExp2C1);
  p = std::fma(p, f, 1.0F);
  const auto exponent = static_cast<std::uint32_t>(127 + static_cast<std::int32_t>(n)) << 23;
  return p * std::bit_cast<float>(exponent);  // exact: n >= -93
}

inline float tanh(float x) noexcept {
  const float e = exp_nonpositive(-2.0F * std::fabs(x));
  return std::copysign((1.0F - e) / (1.0F + e), x);
}

}  // namespace inferos::kernels::scalar
