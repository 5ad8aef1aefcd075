#pragma once
// The block format: 64 tokens of one (layer, kv head), the same bytes for every ISA. docs/block-format.md has the byte table.
//
// head_dim D is a multiple of 16 in 16..256. T = 64 tokens. All multi-byte values are little-endian; fp16 is IEEE binary16.
// Every record starts 64-byte aligned and each of its four parts is a multiple of 64 bytes long.
//
//   F16    K  fp16 [tokens/16][D][16 tokens]      lanes are tokens: no horizontal sums, and it is the B panel of a GEMM
//          V  fp16 [tokens][D]                     tokens = capacity, a multiple of 16 (64, or less for a sink block)
//   INT8   K  u8   [T/32][D/4][32 tokens][4 channels]
//          Ks fp16 scale[D], fp16 minimum[D]       K ~ minimum[d] + scale[d] * code
//          V  s8   [D/16][T/4][16 channels][4 tokens]
//          Vs fp16 scale[T]                        V ~ scale[t] * code
//   INT4   K  u4   [T/32][D/8][32 tokens][4 bytes] byte j of a token: low nibble channel 8i+j, high nibble channel 8i+4+j
//          Ks as INT8, 15 steps instead of 255
//          V  u4   [D/16][T/8][16 channels][4 bytes] byte j of a channel: low nibble token 8i+j, high nibble token 8i+4+j
//          Vs fp16 scale[T], fp16 minimum[T]       R(V) ~ minimum[t] + scale[t] * code, R = hadamard.hpp's rotation
//   K8V4   K and Ks of INT8, V and Vs of INT4
//
// A packed block may hold fewer than 64 valid tokens; the codes of the others are 0 and their V scales and minima are 0.

#include <cstddef>
#include <cstdint>

namespace inferos::kernels {

inline constexpr std::size_t kBlockTokens = 64;
inline constexpr std::size_t kMinHeadDim = 16;
inline constexpr std::size_t kMaxHeadDim = 256;
inline constexpr std::size_t kHeadDimStep = 16;

enum class Format : std::uint8_t { kF16 = 0, kInt8 = 1, kK8V4 = 2, kInt4 = 3 };
inline constexpr std::size_t kFormats = 4;

constexpr bool valid_head_dim(std::size_t d) noexcept {
  return d >= kMinHeadDim && d <= kMaxHeadDim && d % kHeadDimStep == 0;
}
constexpr bool v_is_rotated(Format f) noexcept { return f == Format::kK8V4 || f == Format::kInt4; }

// The functions below are static: an ISA file that calls them must not leave a symbol that the linker may choose for everyone.

// Byte offsets of the four parts of a packed record, and its size. Not for F16.
struct BlockLayout {
  std::size_t k_codes, k_scales, v_codes, v_scales, bytes;
};

static constexpr BlockLayout packed_layout(Format f, std::size_t d) noexcept {
  const std::size_t k = f == Format::kInt4 ? kBlockTokens * d / 2 : kBlockTokens * d;
  const std::size_t v = f == Format::kInt8 ? kBlockTokens * d : kBlockTokens * d / 2;
  const std::size_t vs = f == Format::kInt8 ? kBlockTokens * 2 : kBlockTokens * 4;
  const std::size_t ks = d * 4;
  return {0, k, k + ks, k + ks + v, k + ks + v + vs};
}

static constexpr std::size_t f16_block_bytes(std::size_t d, std::size_t capacity_tokens) noexcept {
  return capacity_tokens * d * 4;
}
static constexpr std::size_t block_bytes(Format f, std::size_t d) noexcept {
  return f == Format::kF16 ? f16_block_bytes(d, kBlockTokens) : packed_layout(f, d).bytes;
}

// What a kernel reads: one block and which of its tokens count.
struct BlockView {
  const std::byte* data;
  std::int32_t start;      // position of the block's token 0 in the sequence
  std::uint16_t begin;     // first valid token of the block
  std::uint16_t end;       // one past the last valid token
  std::uint16_t capacity;  // tokens a F16 block was laid out for (V starts at capacity * D * 2 bytes); else 64
};

}  // namespace inferos::kernels
