#pragma once
// The probability that the tokens of a block received, from the logits that the decode kernel kept.

#include <cstddef>

#include "kernels/block.hpp"

namespace inferos::attention {

// mass[start + t] += sum over g of weight[g] * exp(logits[g][t] - top[g]) for the block's tokens; mass is by position.
// exp is good to 1e-5 here: a score needs no more, and the loop runs in the baseline's vectors, the same on every machine.
void add_block_mass(const kernels::BlockView& block, const float* logits, std::size_t group, const float* top,
                    const float* weight, float* mass) noexcept;

}  // namespace inferos::attention
