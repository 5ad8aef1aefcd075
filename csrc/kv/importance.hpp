#pragma once
// What each block of a layer is worth, and which blocks are to be packed narrower: the `auto` format.
//
// Every 8th decoded token (and every prefill chunk) the attention kernel yields the probability each token received. A finished block keeps an
// exponential average of it per token, decaying by gamma per token of the sequence, and the norm of each token's value vector.
// Score of a block = mean over its 8 highest tokens of average * norm: one heavy token is enough to matter, an average over 64 hides it.
// Every 64 tokens a review ranks the blocks outside the window per head and demotes the lowest until the shares of SPEC 3.2 hold.
// A verdict counts when two consecutive reviews agree; demotion is one-way. All of it depends on token indexes only.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/arena.hpp"
#include "kv/grid.hpp"
#include "kv/layer_store.hpp"

namespace inferos::kv {

// Targets for shares of the blocks outside the window: at most 1 - l1 of them FP16, at most 1 - l2 of them FP16 or INT8.
struct Thresholds {
  double l1 = 1.0;  // 0 <= l2 <= l1 <= 1
  double l2 = 0.7;
  double gamma = 0.997;  // decay of an average, per token; 0 < gamma < 1
};

inline constexpr std::int64_t kMassInterval = 8;     // tokens between two samples of the attention mass
inline constexpr std::int64_t kReviewInterval = 64;  // tokens between two reviews

// The tokens of one block of one head, fp16, in the arena.
class ScoreRecord {
 public:
  explicit ScoreRecord(Arena& arena)
      : arena_(arena), data_(reinterpret_cast<std::uint16_t*>(arena.allocate(kBytes, ArenaTag::kScore))) {}
  ~ScoreRecord() { arena_.release(reinterpret_cast<std::byte*>(data_), kBytes, ArenaTag::kScore); }
  ScoreRecord(const ScoreRecord&) = delete;
  ScoreRecord& operator=(const ScoreRecord&) = delete;

  std::uint16_t* average() const noexcept { return data_; }  // of the mass, times kMassUnit
  std::uint16_t* norm() const noexcept { return data_ + kBlockTokens; }

  static constexpr std::size_t kBytes = 2 * kBlockTokens * sizeof(std::uint16_t);

 private:
  Arena& arena_;
  std::uint16_t* data_;
};

using ScorePtr = std::unique_ptr<ScoreRecord>;

class LayerScores {
 public:
  // `narrowest`: what this layer's blocks may become at most; kF16 = they stay. `phase`, 0..63: how many tokens before the others
  // this layer is reviewed, so that one step does not pay for all layers.
  LayerScores(const LayerShape& shape, const Thresholds& thresholds, Format narrowest, std::int64_t phase);

  // Records for `fresh` new grid entries, by grid index, then head. Error{kBudget}.
  std::vector<ScorePtr> reserve(Arena& arena, std::size_t fresh);
  void place(std::vector<ScorePtr>& fresh) noexcept;
  // Tokens from..to-1; v: [to - from][kv_heads][head_dim].
  void write(const Grid& grid, std::int64_t from, std::int64_t to, const float* v) noexcept;
  // After the grid was truncated. A rewind also sets the clocks back; a rollback does not: the step runs again, and what it
  // measured the first time is not counted twice.
  void truncate(const Grid& grid) noexcept;
  void set_back(std::int64_t length) noexcept;
  void forget_before(std::size_t first) noexcept;
  LayerScores fork(Arena& arena) const;

  // Whether the kernel should yield the mass of a step that makes `visible` tokens visible.
  bool wants_mass(const Grid& grid, std::int64_t visible) const noexcept;
  void fold(const Grid& grid, std::size_t head, std::span<const float> mass) const noexcept;  // mass: [visible]
  void folded(const Grid& grid, std::int64_t visible) noexcept;                               // all heads are

  // Due once every 64 tokens; the verdicts that hold become the backlog.
  void review(const Grid& grid, const LayerStore& store, std::int64_t length) noexcept;
  bool has_backlog() const noexcept { return cursor_ < verdicts_.size(); }
  // A few of the backlog for the step behind `length` tokens, so that no single step pays for a whole review; none where that step
  // has taken its share before it was rolled back. Block pointers are still empty.
  std::vector<Demotion> next_demotions(const LayerStore& store, std::int64_t length);
  void demoted(std::int64_t length) noexcept;  // those of next_demotions are done

  double score(const Grid& grid, std::size_t head,
               std::size_t index) const noexcept;  // < 0 where nothing was measured yet
  std::size_t bytes() const noexcept { return records_.size() * ScoreRecord::kBytes; }

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
  std::size_t blocks() const noexcept { return weights_.size(); }
  double keep_at(std::int64_t visible) const noexcept;
  Format format_of(int level) const noexcept;
  void rank(const Grid& grid, const LayerStore& store, std::size_t head) noexcept;
  void demote_lowest(int level, double share) noexcept;

  std::size_t heads_;
  std::size_t head_dim_;
  Thresholds thresholds_;
  Format narrowest_;
  std::int64_t phase_;
  std::size_t first_ = 0;          // grid index of the first block held
  std::int64_t folded_at_ = 0;     // visible tokens at the last sample
  std::int64_t reviewed_at_ = 0;   // committed tokens at the last review
  std::int64_t demoted_at_ = -1;   // committed tokens when the last few were demoted
  double keep_ = 0.0;              // what the last sample left of the averages
  std::size_t cursor_ = 0;         // verdicts below it are carried out
  std::size_t next_cursor_ = 0;    // the same, once the open step has demoted its share
  std::vector<ScorePtr> records_;  // at(head, index)
  std::vector<Verdict> verdicts_;  // at(head, index)
  std::vector<double> weights_;    // per block: what the average's weights sum to, 0 before the first sample
  std::vector<double> scores_;     // scratch of a review, at(head, index)
  std::vector<Ranked> ranking_;    // scratch of a review, one entry per block
};

}  // namespace inferos::kv
