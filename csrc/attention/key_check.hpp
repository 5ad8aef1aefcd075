#pragma once
// How far INT4 keys would move a layer's attention: kv/key_safety.hpp decides by it.

#include <optional>

#include "attention/plan.hpp"
#include "core/executor.hpp"
#include "kv/key_safety.hpp"

namespace inferos::attention {

// What a layer's output would change by, were the keys of its finished blocks INT4 and not INT8, over a sample of the row's newest 64 queries and all heads. Measured
// on each head's heaviest blocks, whose values are INT4 both times, and taken to be so in the others by their share of the attention; everything else that a query sees is as it is held.
// Blocks that are INT4 already count for nothing; nullopt where no other is.
std::optional<kv::KeyError> int4_error(const RowPlan& row, const Shape& shape, Executor& executor);

}  // namespace inferos::attention
