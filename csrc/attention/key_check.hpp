#pragma once
// How far INT4 would move a layer's attention: kv/key_safety.hpp decides by it.

#include <optional>

#include "attention/plan.hpp"

namespace inferos::attention {

// Mean KL divergence, over a sample of the row's newest queries and all heads, between the softmax on a sample of the head's finished blocks as they
// are held and on the same blocks with their keys in INT4, in nats. Blocks that are INT4 already count for nothing; nullopt where no other is.
std::optional<double> int4_divergence(const RowPlan& row, const Shape& shape);

}  // namespace inferos::attention
