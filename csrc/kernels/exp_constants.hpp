#pragma once
// exp(x) for x <= 0, the same operations on every ISA (each ISA writes them in its own registers):
//   x < kExpFloor          -> exactly 0 (below 2^-92 a probability changes nothing, and no product of one is ever subnormal)
//   n = rint(x * kLog2e);  f = fma(x, kLog2e, -n);  f = fma(x, kLog2eLow, f)       |f| <= 1/2 + 2e-6
//   2^n * (1 + f * (c1 + f * (c2 + ... f * c6)))   by Horner's rule, every step one fma
// The coefficients are a weighted least-squares (near minimax) fit of 2^f on [-1/2, 1/2], relative error 2e-9 before
// rounding; measured in float: at most 1e-7. exp(0) is exactly 1.

namespace inferos::kernels {

inline constexpr float kExpFloor = -64.0F;
inline constexpr float kLog2e = 0x1.715476p+0F;
inline constexpr float kLog2eLow = 0x1.4ae0c0p-26F;
inline constexpr float kExp2C1 = 0x1.62e430p-1F;
inline constexpr float kExp2C2 = 0x1.ebfbdcp-3F;
inline constexpr float kExp2C3 = 0x1.c6aee8p-5F;
inline constexpr float kExp2C4 = 0x1.3b2d4cp-7F;
inline constexpr float kExp2C5 = 0x1.5f3e56p-10F;
inline constexpr float kExp2C6 = 0x1.41fbb8p-13F;

}  // namespace inferos::kernels
