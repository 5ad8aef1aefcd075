#include "kernels/attend.hpp"

#include <array>

#include "kernels/attend_isa.hpp"

namespace inferos::kernels {
namespace {

constexpr std::array kAll{
    Attend{Isa::kScalar, scalar::attend_decode, scalar::attend_expand, scalar::attend_prefill},
};

}  // namespace

std::span<const Attend> attend_runnable() { return kAll; }

const Attend& attend() { return kAll[0]; }

}  // namespace inferos::kernels
