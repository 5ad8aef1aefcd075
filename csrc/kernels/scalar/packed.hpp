#pragma once
// One value of a block (block.hpp) at a time: what the specification reads with.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/fp16.hpp"
#include "kernels/block.hpp"

namespace inferos::kernels::scalar {

inline float half_at(const std::byte* values, std::size_t i) noexcept {
  std::uint16_t bits = 0;
  std::memcpy(&bits, values + 2 * i, sizeof bits);
  return f16_to_f32(bits);
}

inline std::int32_t byte_at(const std::byte* codes, std::size_t i) noexcept {
  return std::to_integer<std::int32_t>(codes[i]);
}

inline std::int32_t nibble(std::int32_t byte, bool high) noexcept { return high ? byte >> 4 : byte & 15; }

inline std::int32_t k_code(const std::byte* codes, bool wide, std::size_t d, std::size_t t, std::size_t c) noexcept {
  const std::size_t in_tile = t % 32 * 4 + c % 4;
  if (wide) return byte_at(codes, t / 32 * 32 * d + c / 4 * 128 + in_tile);
  return nibble(byte_at(codes, t / 32 * 16 * d + c / 8 * 128 + in_tile), c % 8 >= 4);
}

inline std::int32_t v_code(const std::byte* codes, bool wide, std::size_t t, std::size_t c) noexcept {
  const std::size_t in_tile = c % 16 * 4 + t % 4;
  if (wide) return static_cast<std::int8_t>(byte_at(codes, c / 16 * 16 * kBlockTokens + t / 4 * 64 + in_tile));
  return nibble(byte_at(codes, c / 16 * 8 * kBlockTokens + t / 8 * 64 + in_tile), t % 8 >= 4);
}

}  // namespace inferos::kernels::scalar
