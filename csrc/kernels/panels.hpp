#pragma once
// Keys in the order of a F16 block (block.hpp): a panel is sixteen tokens, fp16 [D][16 tokens]. Both functions only convert and
// transpose, so what is read back is what Convert's functions give, bit for bit, NaN included.

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/cpu.hpp"

namespace inferos::kernels {

struct Panels {
  Isa isa;
  // Sixteen rows of D values, `stride` values from one to the next -> panel, each value as Convert::f32_to_f16_saturate rounds it.
  void (*store)(const float* rows, std::size_t stride, std::size_t d, std::uint16_t* panel) noexcept;
  // panel -> rows[16][D], the same fp16 bits.
  void (*load)(const std::uint16_t* panel, std::size_t d, std::uint16_t* rows) noexcept;
};

// Scalar first; only what this CPU can run. There is no AVX-512 variant: the AVX2 one moves what memory delivers.
std::span<const Panels> panels_runnable();
const Panels& panels();  // the fastest within active_isa(), and throws as it does

}  // namespace inferos::kernels
