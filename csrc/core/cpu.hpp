#pragma once
// Instruction sets this CPU and its operating system can run, and the one in use.

#include <cstddef>
#include <span>
#include <string_view>

namespace inferos {

enum class Isa { kScalar = 0, kAvx2 = 1, kAvx512Vnni = 2 };

std::string_view isa_name(Isa isa) noexcept;    // "scalar", "avx2", "avx512vnni"
bool isa_runnable(Isa isa) noexcept;            // cpuid and xgetbv, asked once
std::span<const Isa> runnable_isas() noexcept;  // scalar first, fastest last
// Fastest runnable one, or the one named by the environment variable INFEROS_ISA, read once.
// Throws Error{kConfig} where INFEROS_ISA names none, or one this CPU cannot run.
Isa active_isa();
std::size_t l1_data_bytes() noexcept;  // of a core's first-level data cache; 0 where the CPU does not say

}  // namespace inferos
