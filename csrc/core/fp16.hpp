#pragma once
// IEEE binary16 <-> binary32 for single values, in portable C++. The specification of kernels/quantize.hpp's Convert.

#include <bit>
#include <cstdint>

namespace inferos {

inline constexpr float kF16Max = 65504.0F;

// Exact. A signalling NaN becomes quiet, as F16C does.
inline float f16_to_f32(std::uint16_t h) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000U) << 16;
  const std::uint32_t magnitude = h & 0x7FFFU;
  if (magnitude < 0x0400U) {  // zero and subnormals: magnitude * 2^-24
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(static_cast<float>(magnitude) * 0x1p-24F) | sign);
  }
  std::uint32_t bits = magnitude << 13;
  if (magnitude < 0x7C00U) {
    bits += 112U << 23;  // exponent bias 127 - 15
  } else {
    bits += 224U << 23;
    if (magnitude > 0x7C00U) bits |= 0x0040'0000U;
  }
  return std::bit_cast<float>(bits | sign);
}

// Nearest, ties to even; beyond +-65520 to infinity. NaN: sign and top 10 payload bits kept, quiet bit set.
inline std::uint16_t f32_to_f16(float x) noexcept {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = bits >> 16 & 0x8000U;
  const std::uint32_t magnitude = bits & 0x7FFF'FFFFU;
  std::uint32_t half = 0;
  if (magnitude > 0x7F80'0000U) {
    half = 0x7E00U | (magnitude >> 13 & 0x03FFU);
  } else if (magnitude >= 0x477F'F000U) {  // 65520: half way between 65504 and 65536
    half = 0x7C00U;
  } else if (magnitude < 0x3880'0000U) {  // below 2^-14: one ulp of 0.5 is 2^-24, so this addition does the rounding
    half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) - 0x3F00'0000U;
  } else {
    half = (magnitude - (112U << 23) + 0x0FFFU + (magnitude >> 13 & 1U)) >> 13;
  }
  return static_cast<std::uint16_t>(half | sign);
}

// As f32_to_f16, but beyond +-65504 (infinity too) to +-65504. NaN stays NaN.
inline std::uint16_t f32_to_f16_saturate(float x) noexcept {
  return f32_to_f16(x > kF16Max ? kF16Max : x < -kF16Max ? -kF16Max : x);
}

}  // namespace inferos
