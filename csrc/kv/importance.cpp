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
  if (record) kernels::prefetch(record.data(), bytes);
}

// The mass of a block's tokens, what is not positive counting as 0. In lanes, as above.
float total(const float* mass, std::size_t tokens) noexcept {
  constexpr std::size_t kLanes = 16;
  float lanes[kLanes] = {};
  std::size_t i = 0;
  for (; i + kLanes <= tokens; i += kLanes) {
    for (std::size_t j = 0; j < kLanes; ++j) lanes[j] += mass[i + j] > 0.0F ? mass[i + j] : 0.0F;
  }
  for (; i < tokens; ++i) lanes[i % kLanes] += mass[i] > 0.0F ? mass[i] : 0.0F;
  return std::accumulate(std::begin(lanes), std::end(lanes), 0.0F);
}

// The mean over the heaviest tokens, in units of the averages.
double worth(const std::uint16_t* average, const std::uint16_t* norm, std::size_t tokens) noexcept {
  const std::size_t heaviest = std::min(kernels::kHeaviest, tokens);
  return kernels::importance().heaviest(average, norm, tokens) / static_cast<double>(heaviest);
}

double sum_of(const std::uint16_t* average, std::size_t tokens) noexcept {
  float values[kBlockTokens];
  kernels::convert().f16_to_f32(average, tokens, values);
  return std::accumulate(values, values + tokens, 0.0);
}

}  // namespace

void ScoreRecord::move_to(std::byte* to) noexcept {
  std::memcpy(to, data_, kBytes);
  data_ = to;
}

LayerScores::LayerScores(const LayerShape& shape, double gamma, bool wanted, bool external)
    : heads_(shape.kv_heads), head_dim_(shape.head_dim), gamma_(gamma), wanted_(wanted), is_external_(external) {}

std::size_t LayerScores::pages(std::size_t count) const noexcept {
  constexpr std::size_t kPer = ScoreRecord::kBlocks;
  return count == 0 ? 0 : (first_ + count + kPer - 1) / kPer - first_ / kPer;
}

ScoreReservation LayerScores::reserve(Arena& arena, std::size_t fresh) {
  ScoreReservation taken;
  taken.tokens.reserve(fresh * heads_);
  for (std::size_t i = 0; i < fresh * heads_; ++i) taken.tokens.emplace_back(arena);
  const std::size_t more = pages(blocks() + fresh) * heads_ - wholes_.size();
  taken.wholes.reserve(more);
  for (std::size_t i = 0; i < more; ++i) taken.wholes.emplace_back(arena);
  make_room(records_, taken.tokens.size());
  make_room(wholes_, more);
  make_room(weights_, fresh);
  if (is_external_) make_room(external_, taken.tokens.size());
  return taken;
}

void LayerScores::place(ScoreReservation& fresh) noexcept {
  const std::size_t added = fresh.tokens.size();
  if (is_external_) external_.resize(external_.size() + added, std::numeric_limits<double>::quiet_NaN());
  std::move(fresh.wholes.begin(), fresh.wholes.end(), std::back_inserter(wholes_));
  for (ScoreRecord& record : fresh.tokens) {
    std::memset(record.data(), 0, ScoreRecord::kBytes);
    records_.push_back(std::move(record));
  }
  for (std::size_t i = 0; i < added / heads_; ++i) {
    for (std::size_t head = 0; head < heads_; ++head) whole(head, first_ + blocks()) = {};
    weights_.push_back(0.0);
  }
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
  wholes_.resize(pages(held) * heads_);
  if (is_external_) external_.resize(held * heads_);
  if (held == 0 || grid[first_ + held - 1].finished()) return;
  // The last block takes tokens again: what was measured before is not about them.
  weights_.back() = 0.0;
  for (std::size_t h = 0; h < heads_; ++h) {
    const ScoreRecord& record = records_[at(h, first_ + held - 1)];
    if (record) std::memset(record.average(), 0, kBlockTokens * sizeof(std::uint16_t));
    BlockScore& score = whole(h, first_ + held - 1);
    score.mass = std::min(score.mass, 0.0F);
    if (is_external_) external_[at(h, first_ + held - 1)] = std::numeric_limits<double>::quiet_NaN();
  }
}

void LayerScores::forget_before(std::size_t first) noexcept {
  drop_front(records_, (first - first_) * heads_);
  if (is_external_) drop_front(external_, (first - first_) * heads_);
  drop_front(weights_, first - first_);
  drop_front(wholes_, (first / ScoreRecord::kBlocks - first_ / ScoreRecord::kBlocks) * heads_);
  first_ = first;
}

LayerScores LayerScores::fork(Arena& arena) const {
  LayerScores copy({heads_, head_dim_, -1}, gamma_, wanted_, is_external_);
  copy.first_ = first_;
  copy.folded_at_ = folded_at_;
  copy.keep_ = keep_;
  const auto duplicate = [&](const std::vector<ScoreRecord>& from, std::vector<ScoreRecord>& to) {
    to.reserve(from.size());
    for (const ScoreRecord& record : from) {
      to.push_back(record ? ScoreRecord(arena) : ScoreRecord());
      if (record) std::memcpy(to.back().data(), record.data(), ScoreRecord::kBytes);
    }
  };
  duplicate(records_, copy.records_);
  duplicate(wholes_, copy.wholes_);
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
    if (record) {
      fold_block(record.average(), mass.data() + entry.start, entry.tokens, keep, add);
    } else if (BlockScore& score = whole(head, first_ + i); score.mass >= 0.0F) {
      score.mass = score.mass * keep + total(mass.data() + entry.start, entry.tokens) * add;
    }
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
    return is_held(head, index) ? external_[at(head, index)] : kUnknown;
  }
  if (!is_measured(head, index)) return kUnknown;
  const std::size_t place = at(head, index);
  if (place + kAhead < records_.size())
    prefetch(records_[place + kAhead], ScoreRecord::kBytes);  // asked for in this order
  const ScoreRecord& record = records_[place];
  const BlockScore& score = whole(head, index);
  const double own = record ? worth(record.average(), record.norm(), grid[index].tokens)
                            : static_cast<double>(score.mass) * static_cast<double>(score.density);
  // The average starts at 0: dividing by its weights' sum gives young blocks their due.
  return own / weights_[index - first_] / static_cast<double>(kMassUnit);
}

void LayerScores::coarsen(const Grid& grid, std::size_t head, std::size_t index) noexcept {
  if (!records_[at(head, index)]) return;
  const ScoreRecord record = std::move(records_[at(head, index)]);
  const std::size_t tokens = grid[index].tokens;
  const double mass = sum_of(record.average(), tokens);
  double density = 0.0;
  if (mass > 0.0) {
    density = worth(record.average(), record.norm(), tokens) / mass;
  } else {  // as if it were spread evenly
    constexpr std::uint16_t kOne = 0x3C00;
    std::uint16_t even[kBlockTokens];
    std::fill_n(even, tokens, kOne);
    density = worth(even, record.norm(), tokens) / static_cast<double>(tokens);
  }
  whole(head, index) = {static_cast<float>(mass), static_cast<float>(density)};
}

void LayerScores::set_external(std::span<const double> scores, std::size_t grid_size) {
  for (std::size_t i = 0; i < records_.size(); ++i) {
    external_[i] = scores[i % heads_ * grid_size + first_ + i / heads_];
  }
}

float LayerScores::token_mass(const Grid& grid, std::size_t head, std::size_t index, std::size_t token) const noexcept {
  if (!is_measured(head, index)) return std::numeric_limits<float>::quiet_NaN();
  const ScoreRecord& record = records_[at(head, index)];
  const double average = record ? static_cast<double>(f16_to_f32(record.average()[token]))
                                : static_cast<double>(whole(head, index).mass) / grid[index].tokens;
  return static_cast<float>(average / weights_[index - first_] / static_cast<double>(kMassUnit));
}

float LayerScores::token_norm(std::size_t head, std::size_t index, std::size_t token) const noexcept {
  const ScoreRecord& record = records_[at(head, index)];
  return record ? f16_to_f32(record.norm()[token]) : std::numeric_limits<float>::quiet_NaN();
}

double LayerScores::mass(const Grid& grid, std::size_t head, std::size_t index) const noexcept {
  if (!is_measured(head, index)) return -1.0;
  const ScoreRecord& record = records_[at(head, index)];
  const double sum =
      record ? sum_of(record.average(), grid[index].tokens) : static_cast<double>(whole(head, index).mass);
  return sum / weights_[index - first_] / static_cast<double>(kMassUnit);
}

std::size_t LayerScores::bytes() const noexcept {
  const auto held =
      std::count_if(records_.begin(), records_.end(), [](const ScoreRecord& record) { return bool{record}; });
  return (static_cast<std::size_t>(held) + wholes_.size()) * ScoreRecord::kBytes;
}

void LayerScores::movable(std::vector<ScoreRecord*>& records) noexcept {
  for (std::vector<ScoreRecord>* own : {&records_, &wholes_}) {
    for (ScoreRecord& record : *own) {
      if (record) records.push_back(&record);
    }
  }
}

}  // namespace inferos::kv
