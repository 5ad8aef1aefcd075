// Scalar specification of the quantisers and of the code orders of block.hpp.
//
// Why double is exact here. scale is a fp16 value s, minimum a fp16 value m, so every boundary between two codes,
// B = m + (k + 1/2) s, is a multiple of 2^-25 below 2^18 and thus a double. x and B can be compared without any rounding;
// code_of() takes the rounded quotient as a first guess and lets those comparisons correct it. (The guess alone is wrong
// only where B = 0 and |x| is below 2^-53 of the row's width.) Dequantisation needs no fma: scale * code has at most
// 11 + 8 significant bits, so the product is exact in f32 and the sum is the only rounding.

#include <algorithm>

#include "core/fp16.hpp"
#include "kernels/block.hpp"
#include "kernels/tables.hpp"

namespace inferos::kernels::scalar {
namespace {

constexpr std::size_t kTileTokens = 32;    // tokens of a K tile
constexpr std::size_t kTileChannels = 16;  // channels of a V tile

float as_float(float x) noexcept { return x; }
float as_float(std::uint16_t x) noexcept { return f16_to_f32(x); }
void put(float x, float& y) noexcept { y = x; }
void put(float x, std::uint16_t& y) noexcept { y = f32_to_f16_saturate(x); }

// NaN -> 0, clamped to the range of fp16, -0 -> +0 (the sign of a zero would show up in the stored minimum).
template <class T>
float clean(T value) noexcept {
  const float x = as_float(value);
  if (x != x) return 0.0F;
  return std::clamp(x, -kF16Max, kF16Max) + 0.0F;
}

std::uint16_t floor_f16(float x) noexcept {  // the largest fp16 <= x; |x| <= 65504
  std::uint16_t h = f32_to_f16(x);
  if (f16_to_f32(h) > x) h = static_cast<std::uint16_t>((h & 0x8000U) != 0 ? h + 1 : h - 1);
  return h;
}

std::uint16_t ceil_f16(double y) noexcept {  // the smallest fp16 >= y; 0 <= y < 65504
  std::uint16_t h = f32_to_f16(static_cast<float>(y));
  if (static_cast<double>(f16_to_f32(h)) < y) ++h;
  return h;
}

struct Grid {  // value = minimum + scale * code, code in low..high
  double minimum, scale;
  double low, high;
};

int code_of(float value, const Grid& grid) noexcept {
  if (grid.scale == 0.0) return 0;
  constexpr double kRint = 0x1.8p52;  // adding and subtracting it rounds to the nearest integer, ties to even
  const double x = static_cast<double>(value);
  const double half = grid.scale * 0.5;
  double code = ((x - grid.minimum) / grid.scale + kRint) - kRint;
  const double here = grid.minimum + grid.scale * code;
  if (x > here + half) {
    code += 1.0;
  } else if (x < here - half) {
    code -= 1.0;
  }
  return static_cast<int>(std::clamp(code, grid.low, grid.high));
}

// Minimum and scale of `n` values `stride` apart, stored as fp16 and returned as the grid they span.
template <class T>
Grid asymmetric(const T* x, std::size_t n, std::size_t stride, int steps, std::uint16_t& scale,
                std::uint16_t& minimum) noexcept {
  float low = clean(x[0]);
  float high = low;
  for (std::size_t i = 1; i < n; ++i) {
    const float value = clean(x[i * stride]);
    low = std::min(low, value);
    high = std::max(high, value);
  }
  minimum = floor_f16(low);
  const double base = static_cast<double>(f16_to_f32(minimum));
  scale = ceil_f16((static_cast<double>(high) - base) / steps);
  return {base, static_cast<double>(f16_to_f32(scale)), 0.0, static_cast<double>(steps)};
}

template <class T>
Grid symmetric(const T* x, std::size_t n, std::uint16_t& scale) noexcept {
  float high = 0.0F;
  for (std::size_t i = 0; i < n; ++i) {
    const float value = clean(x[i]);
    high = std::max(high, value < 0.0F ? -value : value);
  }
  scale = ceil_f16(static_cast<double>(high) / 127.0);
  return {0.0, static_cast<double>(f16_to_f32(scale)), -127.0, 127.0};
}

// Where block.hpp puts the code of (token t, channel c); `shift` is the bit position within that byte.
struct Place {
  std::size_t byte;
  unsigned shift;
};
Place k8_place(std::size_t t, std::size_t c, std::size_t d) noexcept {
  return {((t / kTileTokens * (d / 4) + c / 4) * kTileTokens + t % kTileTokens) * 4 + c % 4, 0};
}
Place k4_place(std::size_t t, std::size_t c, std::size_t d) noexcept {
  return {((t / kTileTokens * (d / 8) + c / 8) * kTileTokens + t % kTileTokens) * 4 + c % 4, c % 8 < 4 ? 0U : 4U};
}
Place v8_place(std::size_t t, std::size_t c) noexcept {
  return {((c / kTileChannels * (kBlockTokens / 4) + t / 4) * kTileChannels + c % kTileChannels) * 4 + t % 4, 0};
}
Place v4_place(std::size_t t, std::size_t c) noexcept {
  return {((c / kTileChannels * (kBlockTokens / 8) + t / 8) * kTileChannels + c % kTileChannels) * 4 + t % 4,
          t % 8 < 4 ? 0U : 4U};
}

template <class Code>
void merge(Code& byte, int code, unsigned shift) noexcept {
  byte = static_cast<Code>(byte | code << shift);
}

template <class T, int kSteps, auto kPlace>
void quantize_k(const T* x, std::size_t tokens, std::size_t d, std::uint8_t* codes,
                std::uint16_t* scales_minima) noexcept {
  std::fill_n(codes, kSteps == 255 ? kBlockTokens * d : kBlockTokens * d / 2, std::uint8_t{0});
  for (std::size_t c = 0; c < d; ++c) {
    const Grid grid = asymmetric(x + c, tokens, d, kSteps, scales_minima[c], scales_minima[d + c]);
    for (std::size_t t = 0; t < tokens; ++t) {
      const Place place = kPlace(t, c, d);
      merge(codes[place.byte], code_of(clean(x[t * d + c]), grid), place.shift);
    }
  }
}

template <class T>
void v8(const T* x, std::size_t tokens, std::size_t d, std::int8_t* codes, std::uint16_t* scales) noexcept {
  std::fill_n(codes, kBlockTokens * d, std::int8_t{0});
  std::fill_n(scales, kBlockTokens, std::uint16_t{0});
  for (std::size_t t = 0; t < tokens; ++t) {
    const Grid grid = symmetric(x + t * d, d, scales[t]);
    for (std::size_t c = 0; c < d; ++c) merge(codes[v8_place(t, c).byte], code_of(clean(x[t * d + c]), grid), 0);
  }
}

template <class T>
void v4(const T* x, std::size_t tokens, std::size_t d, std::uint8_t* codes, std::uint16_t* scales_minima) noexcept {
  std::fill_n(codes, kBlockTokens * d / 2, std::uint8_t{0});
  std::fill_n(scales_minima, 2 * kBlockTokens, std::uint16_t{0});
  for (std::size_t t = 0; t < tokens; ++t) {
    const Grid grid = asymmetric(x + t * d, d, 1, 15, scales_minima[t], scales_minima[kBlockTokens + t]);
    for (std::size_t c = 0; c < d; ++c) {
      const Place place = v4_place(t, c);
      merge(codes[place.byte], code_of(clean(x[t * d + c]), grid), place.shift);
    }
  }
}

template <class T, int kSteps, auto kPlace>
void dequantize_k(const std::uint8_t* codes, const std::uint16_t* scales_minima, std::size_t d, T* x) noexcept {
  for (std::size_t c = 0; c < d; ++c) {
    const float scale = f16_to_f32(scales_minima[c]);
    const float minimum = f16_to_f32(scales_minima[d + c]);
    for (std::size_t t = 0; t < kBlockTokens; ++t) {
      const Place place = kPlace(t, c, d);
      put(minimum + scale * static_cast<float>(codes[place.byte] >> place.shift & kSteps), x[t * d + c]);
    }
  }
}

template <class T>
void un_v8(const std::int8_t* codes, const std::uint16_t* scales, std::size_t d, T* x) noexcept {
  for (std::size_t t = 0; t < kBlockTokens; ++t) {
    const float scale = f16_to_f32(scales[t]);
    for (std::size_t c = 0; c < d; ++c) put(scale * static_cast<float>(codes[v8_place(t, c).byte]), x[t * d + c]);
  }
}

template <class T>
void un_v4(const std::uint8_t* codes, const std::uint16_t* scales_minima, std::size_t d, T* x) noexcept {
  for (std::size_t t = 0; t < kBlockTokens; ++t) {
    const float scale = f16_to_f32(scales_minima[t]);
    const float minimum = f16_to_f32(scales_minima[kBlockTokens + t]);
    for (std::size_t c = 0; c < d; ++c) {
      const Place place = v4_place(t, c);
      put(minimum + scale * static_cast<float>(codes[place.byte] >> place.shift & 15), x[t * d + c]);
    }
  }
}

template <class T>
constexpr QuantizeOf<T> table() noexcept {
  return {quantize_k<T, 255, k8_place>,   quantize_k<T, 15, k4_place>,   v8<T>,    v4<T>,
          dequantize_k<T, 255, k8_place>, dequantize_k<T, 15, k4_place>, un_v8<T>, un_v4<T>};
}

}  // namespace

const Quantize kQuantize{Isa::kScalar, table<float>(), table<std::uint16_t>()};

}  // namespace inferos::kernels::scalar
