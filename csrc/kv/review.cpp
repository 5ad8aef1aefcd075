#include "kv/review.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kv/room.hpp"

namespace inferos::kv {
namespace {

constexpr std::size_t kDemotionsPerStep = 16;  // in one layer

}  // namespace

LayerReview::LayerReview(std::size_t heads, const Thresholds& thresholds, Format narrowest, bool evictable,
                         std::int64_t phase)
    : heads_(heads), thresholds_(thresholds), narrowest_(narrowest), evictable_(evictable), phase_(phase) {}

void LayerReview::reserve(std::size_t fresh) {
  make_room(verdicts_, fresh * heads_);
  scores_.clear();
  make_room(scores_, verdicts_.size() + fresh * heads_);
  ranking_.clear();
  sorted_.clear();
  order_.clear();
  make_room(ranking_, verdicts_.size() / heads_ + fresh);
  make_room(sorted_, verdicts_.size() / heads_ + fresh);
  make_room(order_, verdicts_.size() / heads_ + fresh);
}

void LayerReview::place(std::size_t fresh) noexcept { verdicts_.resize(verdicts_.size() + fresh * heads_); }

void LayerReview::truncate(const Grid& grid) noexcept {
  if (grid.size() < first_) first_ = 0;
  const std::size_t held = std::min(grid.size() - first_, verdicts_.size() / heads_);
  verdicts_.resize(held * heads_);
  if (held == 0 || grid[first_ + held - 1].finished()) return;
  // The last block takes tokens again: what was decided before is not about them.
  std::fill(verdicts_.end() - static_cast<std::ptrdiff_t>(heads_), verdicts_.end(), Verdict{});
}

void LayerReview::set_back(std::int64_t length) noexcept {
  reviewed_at_ = std::min(reviewed_at_, length);
  demoted_at_ = -1;
}

void LayerReview::forget_before(std::size_t first) noexcept {
  drop_front(verdicts_, (first - first_) * heads_);
  first_ = first;
}

LayerReview LayerReview::fork() const {
  LayerReview copy(*this);
  copy.scores_.reserve(verdicts_.size());
  copy.ranking_.reserve(verdicts_.size() / heads_);
  copy.sorted_.reserve(verdicts_.size() / heads_);
  copy.order_.reserve(verdicts_.size() / heads_);
  return copy;
}

// ceil(share * n), with a margin: 0.3 * 10 must be 3, not the 3.0000000000000004 that 1 - 0.7 makes of it.
std::size_t LayerReview::allowed(double share, std::size_t n) noexcept {
  return static_cast<std::size_t>(std::ceil(std::max(share * static_cast<double>(n) - 1e-9, 0.0)));
}

Format LayerReview::format_of(Level level) const noexcept {
  if (level == Level::kL0) return Format::kF16;
  return level == Level::kL1 ? std::min(Format::kInt8, narrowest_) : narrowest_;
}

void LayerReview::measure(const Grid& grid, const LayerScores& scores) noexcept {
  scores_.clear();
  for (std::size_t index = first_; index < grid.due(); ++index) {  // in the order the records lie in memory
    for (std::size_t head = 0; head < heads_; ++head) scores_.push_back(scores.score(grid, head, index));
  }
}

// A verdict that still waits counts as done.
std::span<LayerReview::Ranked> LayerReview::rank(const Grid& grid, const LayerStore& store, std::size_t head) noexcept {
  ranking_.clear();
  for (std::size_t index = first_; index < grid.due(); ++index) {
    if (!store.holds(head, index)) {
      ranking_.push_back({-1.0, index, Level::kL3, narrowest_, false});
      continue;
    }
    const double worth = scores_[at(head, index)];
    const Format waiting = std::min(verdicts_[at(head, index)].held, narrowest_);
    const Format format = std::max(store.format(head, index), waiting);
    const bool measured = !std::isnan(worth);
    ranking_.push_back({measured ? worth : 0.0, index, level_of(format), format, measured});
  }
  // Sorted by small keys: what they stand for is moved once.
  constexpr double kEnd = std::numeric_limits<double>::infinity();
  constexpr double kMost = std::numeric_limits<double>::max();
  order_.clear();
  for (std::size_t i = 0; i < ranking_.size(); ++i) {
    const Ranked& block = ranking_[i];
    const double worth = block.measured ? std::clamp(block.score, -kMost, kMost) : kEnd;
    order_.push_back({block.level == Level::kL3 ? -kEnd : worth, i});
  }
  std::sort(order_.begin(), order_.end(), [](const Order& a, const Order& b) {
    return a.worth < b.worth || (a.worth == b.worth && a.place < b.place);
  });
  sorted_.clear();
  for (const Order& next : order_) sorted_.push_back(ranking_[next.place]);
  ranking_.swap(sorted_);
  return ranking_;
}

// Gives the lowest blocks above `level` the verdict `level` until at most ceil(share * n) are above it; where that is none, measured or not.
void LayerReview::demote_lowest(Level level, double share) noexcept {
  const std::size_t most = allowed(share, ranking_.size());
  auto above = static_cast<std::size_t>(
      std::count_if(ranking_.begin(), ranking_.end(), [&](const Ranked& block) { return block.level < level; }));
  for (Ranked& block : ranking_) {
    if (above <= most) return;
    if (block.level >= level || (!block.measured && most != 0)) continue;
    block.level = level;
    block.verdict = std::max(block.verdict, format_of(level));
    --above;
  }
}

// Verdicts that are not carried out yet.
void LayerReview::drop_waiting(const LayerStore& store, std::size_t head) noexcept {
  for (std::size_t index = first_; index < first_ + verdicts_.size() / heads_; ++index) {
    if (store.holds(head, index)) verdicts_[at(head, index)].held = store.format(head, index);
  }
}

bool LayerReview::is_due(std::int64_t length) const noexcept {
  return narrowest_ != Format::kF16 && (length + phase_) / kReviewInterval != (reviewed_at_ + phase_) / kReviewInterval;
}

void LayerReview::review(const Grid& grid, const LayerStore& store, const LayerScores& scores,
                         std::int64_t length) noexcept {
  if (!is_due(length)) return;
  reviewed_at_ = length;
  measure(grid, scores);
  // Where no block may stay above a level there is nothing to wait for.
  const Format certain = format_of(thresholds_.l2 >= 1.0   ? Level::kL2
                                   : thresholds_.l1 >= 1.0 ? Level::kL1
                                                           : Level::kL0);
  for (std::size_t head = 0; head < heads_; ++head) {
    if (changed_) drop_waiting(store, head);
    rank(grid, store, head);
    demote_lowest(Level::kL2, 1.0 - thresholds_.l2);
    demote_lowest(Level::kL1, 1.0 - thresholds_.l1);
    const std::size_t lowest = evictable() ? evictable_blocks(ranking_.size()) : 0;
    for (std::size_t i = 0; i < ranking_.size(); ++i) {
      const Ranked& block = ranking_[i];
      Verdict& verdict = verdicts_[at(head, block.index)];
      verdict.held = std::max(verdict.held, std::min(std::max(verdict.last, certain), block.verdict));
      verdict.last = block.verdict;
      const bool goes = i < lowest && block.measured;
      verdict.evictable = goes ? std::min<std::uint8_t>(verdict.evictable + 1, kEvictableReviews) : std::uint8_t{0};
    }
  }
  cursor_ = {0, first_};
  changed_ = false;
}

std::vector<Demotion> LayerReview::next_demotions(const LayerStore& store, std::int64_t length) {
  std::vector<Demotion> next;
  next_cursor_ = cursor_;
  if (demoted_at_ == length) return next;
  const std::size_t end = first_ + verdicts_.size() / heads_;
  for (; next_cursor_.head < heads_; next_cursor_ = {next_cursor_.head + 1, first_}) {
    const std::size_t head = next_cursor_.head;
    for (std::size_t& index = next_cursor_.index; (index = std::max(index, first_)) < end; ++index) {
      if (next.size() == kDemotionsPerStep) return next;
      const Format held = std::min(verdicts_[at(head, index)].held, narrowest_);
      if (store.holds(head, index) && held > store.format(head, index)) next.push_back({head, index, held, nullptr});
    }
  }
  return next;
}

void LayerReview::demoted(std::int64_t length) noexcept {
  demoted_at_ = length;
  cursor_ = next_cursor_;
}

double LayerReview::evicted_mass(std::size_t head) const noexcept {
  double sum = 0.0;
  for (std::size_t i = head; i < verdicts_.size(); i += heads_) sum += verdicts_[i].mass;
  return sum > 1.0 ? 1.0 : sum;  // each was measured over what was left then; NaN stays
}

}  // namespace inferos::kv
