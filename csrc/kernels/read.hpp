#pragma once
// Reads memory once and does nothing else: the least time in which a kernel can look at as many bytes. Benchmarks divide by it.
//
//   fold(p, n) = the exclusive or of the n / 8 words of 64 bits at p, which must be 64-byte aligned; n is a multiple of 256.
//
// All ISAs return the same bits.

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/cpu.hpp"

namespace inferos::kernels {

inline constexpr std::size_t kReadStep = 256;  // bytes: four AVX-512 registers

struct Read {
  Isa isa;
  std::uint64_t (*fold)(const std::byte* p, std::size_t n) noexcept;
};

std::span<const Read> read_runnable();  // scalar first, fastest last

}  // namespace inferos::kernels
