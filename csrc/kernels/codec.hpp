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

// Tokens first .. first + count - 1 of a F16 block of `capacity` tokens <- k[count][D], v[count][D] (f32, saturated to fp16), rows
// `stride` values apart.
void store_f16_tokens(std::byte* block, std::size_t d, std::size_t capacity, std::size_t first, std::size_t count,
                      const float* k, const float* v, std::size_t stride) noexcept;

// Hints: brings what will be stored or packed next into L2, `rows` rows of D values `stride` apart, or one piece of memory.
void prefetch_rows(const float* x, std::size_t stride, std::size_t d, std::size_t rows) noexcept;
void prefetch(const std::byte* data, std::size_t bytes) noexcept;

// tokens [0, tokens) of a block of any format -> rows; V un-rotated. Rows beyond `tokens` are unspecified afterwards.
void block_to_rows(Format format, const std::byte* block, std::size_t d, std::size_t capacity, std::size_t tokens,
                   BlockRows& rows) noexcept;

// rows -> packed record of `format` (not F16); V is rotated here where the format asks for it. `rows.v` is scratch afterwards.
void rows_to_block(Format format, BlockRows& rows, std::size_t tokens, std::size_t d, std::byte* block) noexcept;

// F16 block -> packed record of `format`: the bytes that block_to_rows and rows_to_block give, without going through f32 where the
// quantiser need not. `next`: the F16 block, laid out as this one, that will be packed next, or null; it is fetched meanwhile.
// `scratch` is unspecified afterwards.
void f16_to_block(Format format, const std::byte* f16, std::size_t d, std::size_t capacity, std::size_t tokens,
                  const std::byte* next, BlockRows& scratch, std::byte* block) noexcept;

}  // namespace inferos::kernels
