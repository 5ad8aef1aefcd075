#pragma once
// Which blocks of a layer become narrower, and which may go, by what they are worth: the `auto` format.
//
// Every 64 tokens a review ranks the blocks outside the window per head and demotes the lowest until the shares of SPEC 3.2 hold.
// A verdict counts when two consecutive reviews agree, at once where the shares leave no choice, that a block may be evicted when three do; demotion
// is one-way. All of it depends on token indexes only. What happens when a budget is used up is relief.hpp's.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kv/grid.hpp"
#include "kv/importance.hpp"
#include "kv/layer_store.hpp"

namespace inferos::kv {

// Targets for shares of the blocks outside the window: at most 1 - l1 of them FP16, at most 1 - l2 of them FP16 or INT8; the lowest l3 of
// them may be evicted where a budget demands it.
struct Thresholds {
  double l1 = 1.0;  // 0 <= l3 <= l2 <= l1 <= 1
  double l2 = 0.7;
  double l3 = 0.3;
};

// FP16, INT8, INT4 or K8V4, evicted.
enum class Level : std::uint8_t { kL0 = 0, kL1 = 1, kL2 = 2, kL3 = 3 };

inline constexpr std::int64_t kReviewInterval = 64;  // tokens between two reviews
inline constexpr std::uint8_t kEvictableReviews = 3;

class LayerReview {
 public:
  // `narrowest`: what this layer's blocks may become at most; kF16 = they stay. `evictable`: whether they may go altogether.
  // `phase`, 0..63: how many tokens before the others this layer is reviewed, so that one step does not pay for all layers.
  LayerReview(std::size_t heads, const Thresholds& thresholds, Format narrowest, bool evictable, std::int64_t phase);

  // In force from the next review; a verdict that waits to be carried out goes no further than `narrowest`.
  void set_thresholds(const Thresholds& thresholds) noexcept {
    thresholds_ = thresholds;
    changed_ = true;
  }
  void set_limits(Format narrowest, bool evictable) noexcept {
    narrowest_ = narrowest;
    evictable_ = evictable;
  }

  Format narrowest() const noexcept { return narrowest_; }
  bool evictable() const noexcept { return evictable_ && level_of(narrowest_) == Level::kL2; }
  static Level level_of(Format format) noexcept { return static_cast<Level>(std::min(static_cast<int>(format), 2)); }

  void reserve(
      std::size_t fresh);  // room for the verdicts of `fresh` new grid entries, so that place and review cannot fail
  void place(std::size_t fresh) noexcept;
  // After the grid was truncated. A rewind also sets the clocks back.
  void truncate(const Grid& grid) noexcept;
  void set_back(std::int64_t length) noexcept;
  void forget_before(std::size_t first) noexcept;
  LayerReview fork() const;

  // Due once every 64 tokens; the verdicts that hold become the backlog.
  bool is_due(std::int64_t length) const noexcept;
  void review(const Grid& grid, const LayerStore& store, const LayerScores& scores, std::int64_t length) noexcept;
  bool has_backlog() const noexcept { return cursor_.head < heads_; }
  // A few of the backlog for the step behind `length` tokens, so that no single step pays for a whole review; none where that step
  // has taken its share before it was rolled back. Block pointers are still empty.
  std::vector<Demotion> next_demotions(const LayerStore& store, std::int64_t length);
  void demoted(std::int64_t length) noexcept;  // those of next_demotions are done

  // One block outside the window in the order of worth: evicted ones, measured ones by score, those not measured yet by age.
  struct Ranked {
    double score;  // where it was measured
    std::size_t index;
    Level level;     // what it is, or is to become when its verdict is carried out
    Format verdict;  // the same; not where it was evicted
    bool measured;
  };
  void measure(const Grid& grid, const LayerScores& scores) noexcept;  // for all calls of rank() that follow
  std::span<Ranked> rank(const Grid& grid, const LayerStore& store, std::size_t head) noexcept;
  // How many of n blocks, the lowest, may be evicted.
  std::size_t evictable_blocks(std::size_t n) const noexcept { return n - allowed(1.0 - thresholds_.l3, n); }
  // Three reviews in a row have found the block among them.
  bool may_go(std::size_t head, std::size_t index) const noexcept {
    return verdicts_[at(head, index)].evictable == kEvictableReviews;
  }
  // `mass`: its averaged share of the head's attention; NaN where that was not measured.
  void evicted(std::size_t head, std::size_t index, double mass) noexcept { verdicts_[at(head, index)].mass = mass; }
  double evicted_mass(std::size_t head) const noexcept;  // of all blocks that went, 0..1

 private:
  struct Verdict {
    Format last = Format::kF16;  // of the last review
    Format held = Format::kF16;  // two reviews agreed on
    std::uint8_t evictable = 0;  // reviews in a row
    double mass = 0.0;           // when it was evicted
  };

  struct
      Cursor {  // head by head, so that a head's blocks follow each other in memory: a stream that jumps is read more slowly
    std::size_t head = SIZE_MAX;
    std::size_t index = 0;  // in the grid
  };

  struct Order {
    double worth;
    std::size_t place;  // in ranking_
  };

  std::size_t at(std::size_t head, std::size_t index) const noexcept { return (index - first_) * heads_ + head; }
  static std::size_t allowed(double share, std::size_t n) noexcept;
  Format format_of(Level level) const noexcept;
  void demote_lowest(Level level, double share) noexcept;
  void drop_waiting(const LayerStore& store, std::size_t head) noexcept;

  std::size_t heads_;
  Thresholds thresholds_;
  Format narrowest_;
  bool evictable_;
  std::int64_t phase_;
  bool changed_ = false;           // verdicts that wait are of other thresholds
  std::size_t first_ = 0;          // grid index of the first block held
  std::int64_t reviewed_at_ = 0;   // committed tokens at the last review
  std::int64_t demoted_at_ = -1;   // committed tokens when the last few were demoted
  Cursor cursor_;                  // verdicts before it are carried out
  Cursor next_cursor_;             // the same, once the open step has demoted its share
  std::vector<Verdict> verdicts_;  // at(head, index)
  std::vector<double> scores_;     // scratch of a review, at(head, index)
  std::vector<Ranked> ranking_;    // scratch of a review, one entry per block
  std::vector<Ranked> sorted_;     // the same
  std::vector<Order> order_;       // the same
};

}  // namespace inferos::kv
