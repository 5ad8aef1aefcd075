#include "kernels/attend.hpp"

#include <array>

#include "kernels/attend_isa.hpp"
#include "kernels/dispatch.hpp"

namespace inferos::kernels {
namespace {

constexpr std::array kAll{
    Attend{Isa::kScalar, scalar::attend_decode, scalar::attend_expand, scalar::attend_prefill, scalar::attend_mass,
           scalar::attend_exp_below},
#if defined(INFEROS_X86)
    Attend{Isa::kAvx2, avx2::attend_decode, avx2::attend_expand, avx2::attend_prefill, avx2::attend_mass,
           avx2::attend_exp_below},
    Attend{Isa::kAvx512Vnni, avx512vnni::attend_decode, avx512vnni::attend_expand, avx512vnni::attend_prefill,
           avx512vnni::attend_mass, avx512vnni::attend_exp_below},
#endif
};

}  // namespace

std::span<const Attend> attend_runnable() { return runnable_of<Attend>(kAll); }

const Attend& attend() { return active_of(attend_runnable()); }

}  // namespace inferos::kernels
