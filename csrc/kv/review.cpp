#include "kv/review.hpp"

#include <algorithm>
#include <cmath>

#include "kv/room.hpp"

namespace inferos::kv {
namespace {

constexpr std::size_t kDemotionsPerStep = 16;  // in one layer

int level_of(Format format) noexcept { return std::min(static_cast<int>(format), 2); }  // L0, L1, L2

}  // namespace

LayerReview::LayerReview(std::size_t heads, const Thresholds& thresholds, Format narrowest, std::int64_t phase)
    : heads_(heads), thresholds_(thresholds), narrowest_(narrowest), phase_(phase) {}

void LayerReview::reserve(std::size_t fresh) {
  make_room(verdicts_, fresh * heads_);
  scores_.clear();
  make_room(scores_, verdicts_.size() + fresh * heads_);
  ranking_.clear();
  make_room(ranking_, verdicts_.size() / heads_ + fresh);
}

void LayerReview::place(std::size_t fresh) noexcept { verdicts_.resize(verdicts_.size() + fresh * heads_); }

void LayerReview::truncate(const Grid& grid) noexcept {
  if (grid.size() < first_) first_ = 0;
  const std::size_t held = std::min(grid.size() - first_, verdicts_.size() / heads_);
  verdicts_.resize(held * heads_);
  cursor_ = std::min(cursor_, verdicts_.size());
  if (held == 0 || grid[first_ + held - 1].finished()) return;
  // The last block takes tokens again: what was decided before is not about them.
  std::fill(verdicts_.end() - static_cast<std::ptrdiff_t>(heads_), verdicts_.end(), Verdict{});
}

void LayerReview::set_back(std::int64_t length) noexcept {
  reviewed_at_ = std::min(reviewed_at_, length);
  demoted_at_ = -1;
}

void LayerReview::forget_before(std::size_t first) noexcept {
  cursor_ -= std::min(cursor_, (first - first_) * heads_);
  drop_front(verdicts_, (first - first_) * heads_);
  first_ = first;
}

LayerReview LayerReview::fork() const {
  LayerReview copy(*this);
  copy.scores_.reserve(verdicts_.size());
  copy.ranking_.reserve(verdicts_.size() / heads_);
  return copy;
}

Format LayerReview::format_of(int level) const noexcept {
  if (level == 0) return Format::kF16;
  return level == 1 ? std::min(Format::kInt8, narrowest_) : narrowest_;
}

// The head's blocks outside the window, least important first; a verdict that still waits counts as done.
void LayerReview::rank(const Grid& grid, const LayerStore& store, std::size_t head) noexcept {
  ranking_.clear();
  for (std::size_t index = first_; index < grid.due(); ++index) {
    const double worth = scores_[at(head, index)];
    if (worth < 0.0) continue;
    const Format format = std::max(store.format(head, index), verdicts_[at(head, index)].held);
    ranking_.push_back({worth, index, level_of(format), format});
  }
  std::sort(ranking_.begin(), ranking_.end(), [](const Ranked& a, const Ranked& b) {
    return a.score != b.score ? a.score < b.score : a.index < b.index;
  });
}

// Gives the lowest blocks above `level` the verdict `level` until at most ceil(share * n) are above it.
void LayerReview::demote_lowest(int level, double share) noexcept {
  // The margin: 0.3 * 10 must be 3, not the 3.0000000000000004 that 1 - 0.7 makes of it.
  const auto allowed = static_cast<std::ptrdiff_t>(std::ceil(share * static_cast<double>(ranking_.size()) - 1e-9));
  auto above =
      std::count_if(ranking_.begin(), ranking_.end(), [&](const Ranked& block) { return block.level < level; });
  for (Ranked& block : ranking_) {
    if (above <= allowed) return;
    if (block.level >= level) continue;
    block.level = level;
    block.verdict = std::max(block.verdict, format_of(level));
    --above;
  }
}

bool LayerReview::is_due(std::int64_t length) const noexcept {
  return narrowest_ != Format::kF16 && (length + phase_) / kReviewInterval != (reviewed_at_ + phase_) / kReviewInterval;
}

void LayerReview::review(const Grid& grid, const LayerStore& store, const LayerScores& scores,
                         std::int64_t length) noexcept {
  if (!is_due(length)) return;
  reviewed_at_ = length;
  scores_.clear();
  for (std::size_t index = first_; index < grid.due(); ++index) {  // in the order the records lie in memory
    for (std::size_t head = 0; head < heads_; ++head) scores_.push_back(scores.score(grid, head, index));
  }
  for (std::size_t head = 0; head < heads_; ++head) {
    rank(grid, store, head);
    demote_lowest(2, 1.0 - thresholds_.l2);
    demote_lowest(1, 1.0 - thresholds_.l1);
    for (const Ranked& block : ranking_) {
      Verdict& verdict = verdicts_[at(head, block.index)];
      verdict.held = std::max(verdict.held, std::min(verdict.last, block.verdict));
      verdict.last = block.verdict;
    }
  }
  cursor_ = 0;
}

std::vector<Demotion> LayerReview::next_demotions(const LayerStore& store, std::int64_t length) {
  std::vector<Demotion> next;
  next_cursor_ = cursor_;
  if (demoted_at_ == length) return next;
  for (; next_cursor_ < verdicts_.size() && next.size() < kDemotionsPerStep; ++next_cursor_) {
    const std::size_t index = first_ + next_cursor_ / heads_;
    const std::size_t head = next_cursor_ % heads_;
    const Format held = verdicts_[next_cursor_].held;
    if (held > store.format(head, index)) next.push_back({head, index, held, nullptr});
  }
  return next;
}

void LayerReview::demoted(std::int64_t length) noexcept {
  demoted_at_ = length;
  cursor_ = next_cursor_;
}

}  // namespace inferos::kv
