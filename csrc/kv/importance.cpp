#include "kv/importance.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <numeric>
#include <utility>

#include "core/fp16.hpp"
#include "kernels/codec.hpp"
#include "kernels/importance.hpp"
#include "kernels/quantize.hpp"
#include "kv/room.hpp"

namespace inferos::kv {
namespace {

constexpr float kMassUnit = 16384.0F;  // keeps the mass of one token in 10^6 a normal fp16
constexpr float kHalfMax = 65504.0F;

// The sum of squares. In lanes, which the compiler makes vectors of: one chain of additions would take ten times as long.
float square(const float* row, std::size_t head_dim) noexcept {
  float lanes[kernels::kHeadDimStep] = {};
  for (std::size_t i = 0; i < head_dim; i += kernels::kHeadDimStep) {
    for (std::size_t j = 0; j < kernels::kHeadDimStep; ++j) lanes[j] += row[i + j] * row[i + j];
  }
  return std::accumulate(std::begin(lanes), std::end(lanes), 0.0F);
}

// Records lie far apart, and what is measured between two samples leaves no cache with them.
constexpr std::size_t kAhead = 24;
void prefetch(const ScoreRecord& record, std::size_t bytes) noexcept {
  if (record) kernels::prefetch(reinterpret_cast<const std::byte*>(record.average()), bytes);
}

}  // namespace

LayerScores::LayerScores(const LayerShape& shape, double gamma, bool wanted, bool external)
    : heads_(shape.kv_heads), head_dim_(shape.head_dim), gamma_(gamma), wanted_(wanted), is_external_(external) {}

std::vector<ScoreRecord> LayerScores::reserve(Arena& arena, std::size_t fresh) {
  std::vector<ScoreRecord> taken;
  taken.reserve(fresh * heads_);
  for (std::size_t i = 0; i < fresh * heads_; ++i) taken.emplace_back(arena);
  make_room(records_, taken.size());
  make_room(weights_, fresh);
  if (is_external_) make_room(external_, taken.size());
  return taken;
}

void LayerScores::place(std::vector<ScoreRecord>& fresh) noexcept {
  if (is_external_) external_.resize(external_.size() + fresh.size(), std::numeric_limits<double>::quiet_NaN());
  for (ScoreRecord& record : fresh) {
    std::memset(record.average(), 0, ScoreRecord::kBytes);
    records_.push_back(std::move(record));
  }
  for (std::size_t i = 0; i < fresh.size(); i += heads_) weights_.push_back(0.0);
}

void LayerScores::write(const Grid& grid, std::int64_t from, std::int64_t to, const float* v) noexcept {
  for (std::int64_t p = std::max<std::int64_t>(from, grid.origin()); p < to; ++p) {
    const std::size_t index = grid.find(p);
    const float* row = v + static_cast<std::size_t>(p - from) * heads_ * head_dim_;
    for (std::size_t h = 0; h < heads_; ++h, row += head_dim_) {
      const float root = std::sqrt(square(row, head_dim_));
      const float norm = root <= kHalfMax ? root : kHalfMax;  // NaN too: what cannot be ranked counts as heavy
      kernels::convert().f32_to_f16_saturate(&norm, 1, records_[at(h, index)].norm() + (p - grid[index].start));
    }
  }
}

void LayerScores::truncate(const Grid& grid) noexcept {
  if (grid.size() < first_) first_ = 0;
  const std::size_t held = std::min(grid.size() - first_, blocks());
  records_.resize(held * heads_);
  weights_.resize(held);
  if (is_external_) external_.resize(held * heads_);
  if (held == 0 || grid[first_ + held - 1].finished()) return;
  // The last block takes tokens again: what was measured before is not about them.
  weights_.back() = 0.0;
  for (std::size_t h = 0; h < heads_; ++h) {
    std::memset(records_[at(h, first_ + held - 1)].average(), 0, kBlockTokens * sizeof(std::uint16_t));
    if (is_external_) external_[at(h, first_ + held - 1)] = std::numeric_limits<double>::quiet_NaN();
  }
}

void LayerScores::forget_before(std::size_t first) noexcept {
  drop_front(records_, (first - first_) * heads_);
  if (is_external_) drop_front(external_, (first - first_) * heads_);
  drop_front(weights_, first - first_);
  first_ = first;
}

LayerScores LayerScores::fork(Arena& arena) const {
  LayerScores copy({heads_, head_dim_, -1}, gamma_, wanted_, is_external_);
  copy.first_ = first_;
  copy.folded_at_ = folded_at_;
  copy.keep_ = keep_;
  copy.records_.reserve(records_.size());
  for (const ScoreRecord& record : records_) {
    copy.records_.push_back(record ? ScoreRecord(arena) : ScoreRecord());
    if (record) std::memcpy(copy.records_.back().average(), record.average(), ScoreRecord::kBytes);
  }
  copy.weights_ = weights_;
  copy.external_ = external_;
  return copy;
}

bool LayerScores::wants_mass(const Grid& grid, std::int64_t visible) const noexcept {
  if (!wanted_ || grid.size() == 0 || !grid[0].finished()) return false;
  if (visible != folded_at_) return visible / kMassInterval != folded_at_ / kMassInterval;
  // A step that runs again after a rollback: only for the blocks whose sample went with it.
  for (std::size_t i = 0; i < blocks() && grid[first_ + i].finished(); ++i) {
    if (weights_[i] <= 0.0) return true;
  }
  return false;
}

// What a sample of a step that makes `visible` tokens visible leaves of the averages.
double LayerScores::keep_at(std::int64_t visible) const noexcept {
  if (visible == folded_at_) return keep_;  // the step runs again
  return std::pow(gamma_, static_cast<double>(std::max<std::int64_t>(visible - folded_at_, 1)));
}

void LayerScores::fold(const Grid& grid, std::size_t head, std::span<const float> mass) const noexcept {
  const auto visible = static_cast<std::int64_t>(mass.size());
  const double left = keep_at(visible);
  const auto keep = static_cast<float>(left);
  const auto add = static_cast<float>(1.0 - left) * kMassUnit;
  const auto fold_block = kernels::importance().fold;
  for (std::size_t i = 0; i < blocks() && grid[first_ + i].finished(); ++i) {
    if (visible == folded_at_ && weights_[i] > 0.0) continue;
    const GridEntry& entry = grid[first_ + i];
    if (i + kAhead < blocks()) prefetch(records_[at(head, first_ + i + kAhead)], ScoreRecord::kBytes / 2);
    const ScoreRecord& record = records_[at(head, first_ + i)];
    if (record) fold_block(record.average(), mass.data() + entry.start, entry.tokens, keep, add);
  }
}

void LayerScores::folded(const Grid& grid, std::int64_t visible) noexcept {
  const double left = keep_at(visible);
  for (std::size_t i = 0; i < blocks() && grid[first_ + i].finished(); ++i) {
    if (visible == folded_at_ && weights_[i] > 0.0) continue;
    weights_[i] = weights_[i] * left + (1.0 - left);
  }
  keep_ = left;
  folded_at_ = visible;
}

double LayerScores::score(const Grid& grid, std::size_t head, std::size_t index) const noexcept {
  constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
  if (is_external_) {
    const bool held = index >= first_ && index - first_ < blocks() && bool{records_[at(head, index)]};
    return held ? external_[at(head, index)] : kUnknown;
  }
  if (!is_measured(head, index)) return kUnknown;
  const std::size_t place = at(head, index);
  if (place + kAhead < records_.size())
    prefetch(records_[place + kAhead], ScoreRecord::kBytes);  // asked for in this order
  const ScoreRecord& record = records_[place];
  const std::size_t tokens = grid[index].tokens;
  const std::size_t heaviest = std::min(kernels::kHeaviest, tokens);
  const double sum = kernels::importance().heaviest(record.average(), record.norm(), tokens);
  // The average starts at 0: dividing by its weights' sum gives young blocks their due.
  return sum / static_cast<double>(heaviest) / weights_[index - first_] / static_cast<double>(kMassUnit);
}

void LayerScores::set_external(std::span<const double> scores, std::size_t grid_size) {
  for (std::size_t i = 0; i < records_.size(); ++i) {
    external_[i] = scores[i % heads_ * grid_size + first_ + i / heads_];
  }
}

float LayerScores::token_mass(std::size_t head, std::size_t index, std::size_t token) const noexcept {
  if (!is_measured(head, index)) return std::numeric_limits<float>::quiet_NaN();
  const double average = f16_to_f32(records_[at(head, index)].average()[token]);
  return static_cast<float>(average / weights_[index - first_] / static_cast<double>(kMassUnit));
}

float LayerScores::token_norm(std::size_t head, std::size_t index, std::size_t token) const noexcept {
  return f16_to_f32(records_[at(head, index)].norm()[token]);
}

double LayerScores::mass(const Grid& grid, std::size_t head, std::size_t index) const noexcept {
  if (!is_measured(head, index)) return -1.0;
  const std::uint16_t* average = records_[at(head, index)].average();
  float values[kBlockTokens];
  kernels::convert().f16_to_f32(average, grid[index].tokens, values);
  const double sum = std::accumulate(values, values + grid[index].tokens, 0.0);
  return sum / weights_[index - first_] / static_cast<double>(kMassUnit);
}

std::size_t LayerScores::bytes() const noexcept {
  const auto held =
      std::count_if(records_.begin(), records_.end(), [](const ScoreRecord& record) { return bool{record}; });
  return static_cast<std::size_t>(held) * ScoreRecord::kBytes;
}

}  // namespace inferos::kv
