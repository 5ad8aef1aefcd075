#pragma once
// Which blocks of a layer become narrower, by what they are worth: the `auto` format.
//
// Every 64 tokens a review ranks the blocks outside the window per head and demotes the lowest until the shares of SPEC 3.2 hold.
// A verdict counts when two consecutive reviews agree; demotion is one-way. All of it depends on token indexes only.

#include <algorithm>
#include <cstddef>
#include <cstdint>
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

inline constexpr std::int64_t kReviewInterval = 64;  // tokens between two reviews

class LayerReview {
 public:
  // `narrowest`: what this layer's blocks may become at most; kF16 = they stay. `phase`, 0..63: how many tokens before the others
  // this layer is reviewed, so that one step does not pay for all layers.
  LayerReview(std::size_t heads, const Thresholds& thresholds, Format narrowest, std::int64_t phase);

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
  bool has_backlog() const noexcept { return cursor_ < verdicts_.size(); }
  // A few of the backlog for the step behind `length` tokens, so that no single step pays for a whole review; none where that step
  // has taken its share before it was rolled back. Block pointers are still empty.
  std::vector<Demotion> next_demotions(const LayerStore& store, std::int64_t length);
  void demoted(std::int64_t length) noexcept;  // those of next_demotions are done

 private:
  struct Verdict {
    Format last = Format::kF16;  // of the last review
    Format held = Format::kF16;  // two reviews agreed on
  };
  struct Ranked {
    double score;
    std::size_t index;
    int level;
    Format verdict;
  };

  std::size_t at(std::size_t head, std::size_t index) const noexcept { return (index - first_) * heads_ + head; }
  Format format_of(int level) const noexcept;
  void rank(const Grid& grid, const LayerStore& store, std::size_t head) noexcept;
  void demote_lowest(int level, double share) noexcept;

  std::size_t heads_;
  Thresholds thresholds_;
  Format narrowest_;
  std::int64_t phase_;
  std::size_t first_ = 0;          // grid index of the first block held
  std::int64_t reviewed_at_ = 0;   // committed tokens at the last review
  std::int64_t demoted_at_ = -1;   // committed tokens when the last few were demoted
  std::size_t cursor_ = 0;         // verdicts below it are carried out
  std::size_t next_cursor_ = 0;    // the same, once the open step has demoted its share
  std::vector<Verdict> verdicts_;  // at(head, index)
  std::vector<double> scores_;     // scratch of a review, at(head, index)
  std::vector<Ranked> ranking_;    // scratch of a review, one entry per block
};

}  // namespace inferos::kv
