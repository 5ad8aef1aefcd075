#pragma once
// Whole blocks: FP16 window block -> packed record -> another packed record, or back to rows. Built from quantize.hpp and hadamard.hpp.

#include <cstddef>
#include <cstdint>

#include "kernels/block.hpp"

namespace inferos::kernels {

// Rows of one block in f32, the meeting point of all formats. About 128 KiB at head_dim 256: keep one per thread.
struct BlockRows {
  alignas(64) float k[kBlockTokens * kMaxHeadDim];  // [token][D]
  alignas(64) float v[kBlockTokens * kMaxHeadDim];  // [token][D], not rotated
};

// Token `token` of a F16 block of `capacity` tokens <- k[D], v[D] (f32, saturated to fp16).
void store_f16_token(std::byte* block, std::size_t d, std::size_t capacity, std::size_t token, const float* k,
                     const float* v) noexcept;

// tokens [0, tokens) of a block of any format -> rows; V un-rotated. Rows beyond `tokens` are unspecified afterwards.
void block_to_rows(Format format, const std::byte* block, std::size_t d, std::size_t capacity, std::size_t tokens,
                   BlockRows& rows) noexcept;

// rows -> packed record of `format` (not F16); V is rotated here where the format asks for it. `rows.v` is scratch afterwards.
void rows_to_block(Format format, BlockRows& rows, std::size_t tokens, std::size_t d, std::byte* block) noexcept;

}  // namespace inferos::kernels
