#include "kernels/attend.hpp"

#include <array>

#include "kernels/attend_isa.hpp"
#include "kernels/dispatch.hpp"

namespace inferos::kernels {
namespace {

constexpr std::array kAll{
    Attend{Isa::kScalar, scalar::attend_decode, scalar::attend_expand, scalar::attend_prefill, scalar::attend_mass},
#if defined(INFEROS_X86)
    Attend{Isa::kAvx2, avx2::attend_decode, avx2::attend_expand, avx2::attend_prefill, avx2::attend_mass},
    Attend{Isa::kAvx512Vnni, avx512vnni::attend_decode, avx512vnni::attend_expand, avx512vnni::attend_prefill,
           avx512vnni::attend_mass},
#endif
};

}  // namespace

std::span<const Attend> attend_runnable() { return runnable_of<Attend>(kAll); }

const Attend& attend() { return active_of(attend_runnable()); }

}  // namespace inferos::kernels
