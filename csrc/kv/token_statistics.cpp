#include "kv/token_statistics.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#include "kernels/codec.hpp"

namespace inferos::kv {
namespace {

struct HeldBlock {
  Format format;
  BlockView view;
};

std::vector<HeldBlock> in_order(const HeadStreams& streams) {
  std::vector<HeldBlock> held;
  for (std::size_t f = 0; f < kernels::kFormats; ++f) {
    for (const BlockView& view : streams.by_format[f]) held.push_back({static_cast<Format>(f), view});
  }
  std::sort(held.begin(), held.end(),
            [](const HeldBlock& a, const HeldBlock& b) { return a.view.start < b.view.start; });
  return held;
}

double dot(const float* a, const double* b, std::size_t n) noexcept {
  double sum = 0.0;
  for (std::size_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

double norm(const float* x, std::size_t n) noexcept {
  double sum = 0.0;
  for (std::size_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return std::sqrt(sum);
}

}  // namespace

TokenStatistics token_statistics(const LayerStore& store, const LayerScores* scores, const Grid& grid, std::size_t head,
                                 std::int64_t length) {
  const std::size_t d = store.shape().head_dim;
  constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
  TokenStatistics found;
  std::vector<float> keys;
  std::vector<double> mean(d);
  const auto rows = std::make_unique<kernels::BlockRows>();
  for (const auto& [format, view] : in_order(store.streams()[head])) {
    const std::int64_t end = std::min<std::int64_t>(view.start + view.end, length);
    kernels::block_to_rows(format, view.data, d, view.capacity, view.end, *rows);
    for (std::int64_t p = view.start + view.begin; p < end; ++p) {
      const auto token = static_cast<std::size_t>(p - view.start);
      const float* const key = rows->k + token * d;
      const bool scored = scores != nullptr && p >= grid.origin();
      const std::size_t index = scored ? grid.find(p) : 0;
      const auto within = scored ? static_cast<std::size_t>(p - grid[index].start) : 0;
      found.position.push_back(p);
      found.mass.push_back(scored ? static_cast<double>(scores->token_mass(grid, head, index, within)) : kUnknown);
      const double original = scored ? static_cast<double>(scores->token_norm(head, index, within)) : kUnknown;
      found.value_norm.push_back(std::isnan(original) ? norm(rows->v + token * d, d) : original);
      found.key_norm.push_back(norm(key, d));
      keys.insert(keys.end(), key, key + d);
      for (std::size_t c = 0; c < d; ++c) mean[c] += static_cast<double>(key[c]);
    }
  }
  const double length_of_mean = std::sqrt(std::inner_product(mean.begin(), mean.end(), mean.begin(), 0.0));
  for (std::size_t i = 0; i < found.position.size(); ++i) {
    const double lengths = found.key_norm[i] * length_of_mean;
    found.key_similarity.push_back(lengths == 0.0 ? kUnknown : dot(keys.data() + i * d, mean.data(), d) / lengths);
  }
  return found;
}

}  // namespace inferos::kv
