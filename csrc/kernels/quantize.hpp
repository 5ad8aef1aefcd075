#pragma once
// Quantise and dequantise the parts of a block (block.hpp). Each family is a table of functions per ISA; all ISAs return the same bits.
//
// Input rows are x[tokens][D], tokens in 1..64, f32 or fp16. Before anything else NaN becomes 0, -0 becomes +0 and values
// are clamped to +-65504. A code is the integer nearest to the exact real quotient (ties to even) computed with the STORED scale and minimum,
// then clamped; evaluate it in double (exact enough: see quantize.cpp of scalar/), and where a faster ISA works in float it
// falls back to double for every vector that has a quotient within 2^-12 of a tie. So, in float64,
//     |x - (minimum + scale * code)| <= scale / 2      for every value, subnormal rows included.
//
//   asymmetric (K per channel over the tokens, V4 per token over the channels), steps = 255 or 15
//     minimum = the largest fp16 <= min(x)
//     scale   = the smallest fp16 >= (max(x) - minimum) / steps, that quotient taken in double;  0 where max(x) == minimum
//     code    = clamp(round((x - minimum) / scale), 0, steps);  0 where scale == 0
//   symmetric (V8 per token)
//     scale   = the smallest fp16 >= max|x| / 127 (quotient in double);  0 where max|x| == 0
//     code    = clamp(round(x / scale), -127, 127);  0 where scale == 0
//   (the smallest fp16 >= y is 2^-24 for any 0 < y <= 2^-24, so 1/scale never overflows a float)
//
// Dequantise writes x[64][D] = minimum + scale * code, one fused multiply-add in f32 (the f16 variant then rounds to nearest even, and
// saturates: at the very end of the range minimum + scale * code may pass 65504 by half a step).
// K codes of tokens beyond `tokens` are written as 0; V codes, scales and minima of those tokens are 0.

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/cpu.hpp"

namespace inferos::kernels {

template <class T>  // T = float, or std::uint16_t for fp16 bits
struct QuantizeOf {
  void (*k8)(const T* x, std::size_t tokens, std::size_t d, std::uint8_t* codes, std::uint16_t* scales_minima) noexcept;
  void (*k4)(const T* x, std::size_t tokens, std::size_t d, std::uint8_t* codes, std::uint16_t* scales_minima) noexcept;
  void (*v8)(const T* x, std::size_t tokens, std::size_t d, std::int8_t* codes, std::uint16_t* scales) noexcept;
  void (*v4)(const T* x, std::size_t tokens, std::size_t d, std::uint8_t* codes, std::uint16_t* scales_minima) noexcept;
  void (*un_k8)(const std::uint8_t* codes, const std::uint16_t* scales_minima, std::size_t d, T* x) noexcept;
  void (*un_k4)(const std::uint8_t* codes, const std::uint16_t* scales_minima, std::size_t d, T* x) noexcept;
  void (*un_v8)(const std::int8_t* codes, const std::uint16_t* scales, std::size_t d, T* x) noexcept;
  void (*un_v4)(const std::uint8_t* codes, const std::uint16_t* scales_minima, std::size_t d, T* x) noexcept;
};

struct Quantize {
  Isa isa;
  QuantizeOf<float> f32;
  QuantizeOf<std::uint16_t> f16;
};

// Conversions. f32 -> f16 rounds to nearest even; the saturating one maps beyond +-65504 (inf too) to +-65504, NaN stays NaN.
// NaN: sign kept, the top 10 bits of the payload kept, quiet bit set (as F16C does).
struct Convert {
  Isa isa;
  void (*f32_to_f16)(const float* x, std::size_t n, std::uint16_t* y) noexcept;
  void (*f32_to_f16_saturate)(const float* x, std::size_t n, std::uint16_t* y) noexcept;
  void (*f16_to_f32)(const std::uint16_t* x, std::size_t n, float* y) noexcept;
};

std::span<const Quantize> quantize_runnable();  // scalar first; only what this CPU can run
const Quantize& quantize();                     // of active_isa(), and throws as it does: ask for that first
std::span<const Convert> convert_runnable();
const Convert& convert();

}  // namespace inferos::kernels
