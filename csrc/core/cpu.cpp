#include "core/cpu.hpp"

#include <array>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "core/error.hpp"

#if defined(INFEROS_X86)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace inferos {
namespace {

#if defined(INFEROS_X86)
struct Registers {
  std::uint32_t a, b, c, d;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
#if defined(_MSC_VER)
  int out[4];
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
  return {static_cast<std::uint32_t>(out[0]), static_cast<std::uint32_t>(out[1]), static_cast<std::uint32_t>(out[2]),
          static_cast<std::uint32_t>(out[3])};
#else
  Registers r{};
  __cpuid_count(leaf, subleaf, r.a, r.b, r.c, r.d);
  return r;
#endif
}

std::uint64_t enabled_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  std::uint32_t low = 0;
  std::uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
#endif
}

constexpr bool bit(std::uint32_t word, unsigned n) { return (word >> n & 1U) != 0; }

Isa detect() {
  if (cpuid(0, 0).a < 7) return Isa::kScalar;
  const Registers one = cpuid(1, 0);
  const bool osxsave = bit(one.c, 27);
  if (!osxsave || !bit(one.c, 28) || !bit(one.c, 12) || !bit(one.c, 29)) return Isa::kScalar;  // AVX, FMA, F16C
  if (!bit(one.c, 23)) return Isa::kScalar;                                                    // POPCNT
  const std::uint64_t state = enabled_state();
  const Registers seven = cpuid(7, 0);
  if ((state & 0x6) != 0x6 || !bit(seven.b, 5)) return Isa::kScalar;  // XMM and YMM state, AVX2
  const bool avx512 = bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31);  // F DQ BW VL
  if (avx512 && bit(seven.c, 11) && (state & 0xE6) == 0xE6) return Isa::kAvx512Vnni;  // opmask and ZMM state too
  return Isa::kAvx2;
}
// The deterministic cache parameters: AMD has them in a leaf of its own, in Intel's format.
std::size_t detect_l1_data() {
  const bool amd = cpuid(0x80000000U, 0).a >= 0x8000001DU && bit(cpuid(0x80000001U, 0).c, 22);
  if (!amd && cpuid(0, 0).a < 4) return 0;
  for (std::uint32_t index = 0; index < 8; ++index) {
    const Registers cache = cpuid(amd ? 0x8000001DU : 4U, index);
    const std::uint32_t type = cache.a & 0x1FU;
    if (type == 0) break;
    if (type != 1 || (cache.a >> 5 & 0x7U) != 1) continue;  // data, level 1
    const std::size_t ways = (cache.b >> 22) + 1;
    const std::size_t partitions = (cache.b >> 12 & 0x3FFU) + 1;
    const std::size_t line = (cache.b & 0xFFFU) + 1;
    return ways * partitions * line * (std::size_t{cache.c} + 1);
  }
  return 0;
}
#else
Isa detect() { return Isa::kScalar; }
std::size_t detect_l1_data() { return 0; }
#endif

constexpr std::array kAll{Isa::kScalar, Isa::kAvx2, Isa::kAvx512Vnni};

Isa best() noexcept {
  static const Isa isa = detect();
  return isa;
}

Isa choose() {
  const char* wanted = std::getenv("INFEROS_ISA");
  if (wanted == nullptr || *wanted == '\0') return best();
  std::string known;
  for (const Isa isa : runnable_isas()) {
    if (isa_name(isa) == wanted) return isa;
    known += (known.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw Error(ErrorCode::kConfig, "INFEROS_ISA: '" + std::string(wanted) + "' cannot run here; this CPU runs " + known);
}

}  // namespace

std::string_view isa_name(Isa isa) noexcept {
  switch (isa) {
    case Isa::kScalar: return "scalar";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512Vnni: return "avx512vnni";
  }
  return "unknown";
}

bool isa_runnable(Isa isa) noexcept { return isa <= best(); }

std::span<const Isa> runnable_isas() noexcept { return std::span(kAll).first(static_cast<std::size_t>(best()) + 1); }

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

std::size_t l1_data_bytes() noexcept {
  static const std::size_t bytes = detect_l1_data();
  return bytes;
}

}  // namespace inferos
