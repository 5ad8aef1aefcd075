#pragma once
// What is known of the tokens of one head: for scorers that live outside. Keys are read back from the blocks, so a call costs their decoding.

#include <cstdint>
#include <vector>

#include "kv/grid.hpp"
#include "kv/importance.hpp"
#include "kv/layer_store.hpp"

namespace inferos::kv {

struct TokenStatistics {  // of the tokens that are held and committed, oldest first
  std::vector<std::int64_t> position;
  std::vector<double> mass;  // averaged attention probability, of a block at L2 its tokens' mean; NaN = not measured
  std::vector<double> value_norm;  // as it was before packing; of sinks and of a block at L2 as stored
  std::vector<double> key_norm;    // as stored
  std::vector<double>
      key_similarity;  // cosine between the key and the mean of the head's keys; NaN where one of them is 0
};

// `scores`: nullptr where none are kept.
TokenStatistics token_statistics(const LayerStore& store, const LayerScores* scores, const Grid& grid, std::size_t head,
                                 std::int64_t length);

}  // namespace inferos::kv
