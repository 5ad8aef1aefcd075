#pragma once
// What a sampler asks of a row of logits before it looks at single tokens. Only finite logits count: NaN and infinities are as if
// they were not there. A row is cut into chunks of 512, the last one may be shorter.
//
//   largest   tops[i] = the largest of chunk i, -inf where it has none; returns the largest of all
//   weigh     sums[i] = sum of exp((x - top) * inverse_temperature) over chunk i; top >= every finite logit. Returns the sum of all
//             chunks, added in double, ascending.
//   at_least  the positions of the logits >= threshold, ascending; returns how many. `positions` has room for n.
//
// The terms of weigh, in f32:  d = x - top;  c = inverse_temperature * kEighths;  a term counts where d >= -1000 / c (above 2^-125)
//   t = fma(d, c, 1.5 * 2^23);  k = t - 1.5 * 2^23;  r = fma(d, c, -k);  term = 2^(k/8) * (1 + r * (c1 + r * (c2 + r * c3)))
// with 2^(j/8) from a table, the exponent added to its bits, and Horner's rule, every step one fma. Relative error 6e-8, and that of
// rounding c, 1e-8 * |d|: small beside what the rounding of the logits themselves does. Term i of a chunk is added (the product and the sum
// one fma) to lane i % 64, ascending; then lanes (i, i+32), (i, i+16) and so on down to (i, i+1) are added. So all ISAs return the same bits.

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/cpu.hpp"

namespace inferos::kernels {

inline constexpr std::size_t kLogitsChunk = 512;

inline constexpr float kEighths = 0x1.715476p+3F;  // 8 / ln 2
inline constexpr float kWeighLowest = -1000.0F;    // eighths
inline constexpr float kWeighRint = 0x1.8p23F;  // adding it rounds to the nearest integer, which the low bits then hold
inline constexpr float kWeighC1 = 0x1.62e432p-4F;  // minimax on [-1/2, 1/2], relative error 2.7e-8
inline constexpr float kWeighC2 = 0x1.ec0c34p-9F;
inline constexpr float kWeighC3 = 0x1.c69ffap-14F;
// The bits of 2^(j/8), less j << 20: adding k << 20 leaves the exponent k / 8 and takes j = k % 8 away.
inline constexpr std::uint32_t kWeighTable[8] = {0x3F80'0000U, 0x3F7B'95C2U, 0x3F78'37F0U, 0x3F75'FED7U,
                                                 0x3F75'04F3U, 0x3F75'672AU, 0x3F77'44FDU, 0x3F7A'C0C7U};

struct Logits {
  Isa isa;
  float (*largest)(const float* x, std::size_t n, float* tops) noexcept;
  double (*weigh)(const float* x, std::size_t n, float top, float inverse_temperature, float* sums) noexcept;
  std::size_t (*at_least)(const float* x, std::size_t n, float threshold, std::int32_t* positions) noexcept;
};

std::span<const Logits> logits_runnable();  // scalar first; only what this CPU can run
const Logits& logits();                     // of active_isa(), and throws as it does

}  // namespace inferos::kernels
