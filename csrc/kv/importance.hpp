#pragma once
// What each block of a layer is worth: the scores behind the `auto` format. review.hpp decides what follows from them.
//
// Every 8th decoded token (and every prefill chunk) the attention kernel yields the probability each token received. A finished block keeps an
// exponential average of it per token, decaying by gamma per token of the sequence, and the norm of each token's value vector.
// Score of a block = mean over its 8 highest tokens of average * norm: one heavy token is enough to matter, an average over 64 hides it.
//
// Once a block is at its last level only the block as a whole is decided about, and its tokens' values are given up (coarsen): what stays is the average
// of the block's mass, and score over mass as it was then, by which the score follows the mass.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "core/arena.hpp"
#include "kv/grid.hpp"
#include "kv/layer_store.hpp"

namespace inferos::kv {

inline constexpr std::int64_t kMassInterval = 8;  // tokens between two samples of the attention mass

// Of a block as a whole.
struct BlockScore {
  float mass;     // the average, times kMassUnit; while the tokens' are there, 0; < 0 where the block was evicted
  float density;  // score over mass
};

// The tokens of one block of one head, fp16, or 32 blocks of one head as wholes; in the arena. Or nothing.
class ScoreRecord {
 public:
  ScoreRecord() = default;
  explicit ScoreRecord(Arena& arena)  // Error{kBudget}
      : arena_(&arena), data_(arena.allocate(kBytes, ArenaTag::kScore)) {}
  ScoreRecord(ScoreRecord&& other) noexcept : arena_(other.arena_), data_(std::exchange(other.data_, nullptr)) {}
  ScoreRecord& operator=(ScoreRecord&& other) noexcept {
    std::swap(arena_, other.arena_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~ScoreRecord() {
    if (data_ != nullptr) arena_->release(data_, kBytes, ArenaTag::kScore);
  }

  explicit operator bool() const noexcept { return data_ != nullptr; }
  std::byte* data() const noexcept { return data_; }
  std::uint16_t* average() const noexcept {  // of the mass, times kMassUnit
    return reinterpret_cast<std::uint16_t*>(data_);
  }
  std::uint16_t* norm() const noexcept { return average() + kBlockTokens; }
  BlockScore* blocks() const noexcept { return reinterpret_cast<BlockScore*>(data_); }
  void move_to(std::byte* to) noexcept;  // Arena::compact's

  static constexpr std::size_t kBytes = 2 * kBlockTokens * sizeof(std::uint16_t);
  static constexpr std::size_t kBlocks = kBytes / sizeof(BlockScore);

 private:
  Arena* arena_ = nullptr;
  std::byte* data_ = nullptr;
};

// Memory for the scores of new grid entries.
struct ScoreReservation {
  std::vector<ScoreRecord> tokens;  // by grid index, then head
  std::vector<ScoreRecord> wholes;  // by 32 grid indexes, then head
};

class LayerScores {
 public:
  // `gamma`: decay of an average, per token, 0 < gamma < 1. `wanted`: whether anything follows from the scores; else none are measured.
  // `external`: the scores are those of set_external.
  LayerScores(const LayerShape& shape, double gamma, bool wanted, bool external);

  // For `fresh` new grid entries. Error{kBudget}.
  ScoreReservation reserve(Arena& arena, std::size_t fresh);
  void place(ScoreReservation& fresh) noexcept;
  // Tokens from..to-1; v: [to - from][kv_heads][head_dim].
  void write(const Grid& grid, std::int64_t from, std::int64_t to, const float* v) noexcept;
  // After the grid was truncated. A rewind also sets the clock back; a rollback does not: the step runs again, and what it
  // measured the first time is not counted twice.
  void truncate(const Grid& grid) noexcept;
  void set_back(std::int64_t length) noexcept { folded_at_ = std::min(folded_at_, length); }
  void forget_before(std::size_t first) noexcept;
  LayerScores fork(Arena& arena) const;

  // Whether the kernel should yield the mass of a step that makes `visible` tokens visible.
  bool wants_mass(const Grid& grid, std::int64_t visible) const noexcept;
  void fold(const Grid& grid, std::size_t head, std::span<const float> mass) const noexcept;  // mass: [visible]
  void folded(const Grid& grid, std::int64_t visible) noexcept;                               // all heads are

  // From the next step on.
  void set_gamma(double gamma) noexcept { gamma_ = gamma; }
  void set_wanted(bool wanted) noexcept { wanted_ = wanted; }
  // What the blocks are worth in somebody else's eyes, [kv_heads][grid size]; NaN = unknown, as a block is that comes later. Takes the
  // place of the score from now on.
  void set_external(std::span<const double> scores, std::size_t grid_size);

  // NaN where nothing is known yet, or the block was evicted.
  double score(const Grid& grid, std::size_t head, std::size_t index) const noexcept;
  // The block's tokens are not told apart from now on. Nothing where that is so already.
  void coarsen(const Grid& grid, std::size_t head, std::size_t index) noexcept;
  // Of a token of the block, which is held: its averaged probability, the mean of its block where tokens are not told apart, NaN where nothing was measured
  // yet; and the norm of its value, NaN where tokens are not told apart.
  float token_mass(const Grid& grid, std::size_t head, std::size_t index, std::size_t token) const noexcept;
  float token_norm(std::size_t head, std::size_t index, std::size_t token) const noexcept;
  // The averaged share of the attention that a block receives, 0..1; < 0 where nothing was measured yet.
  double mass(const Grid& grid, std::size_t head, std::size_t index) const noexcept;
  void evicted(std::size_t head, std::size_t index) noexcept {
    const ScoreRecord gone = std::move(records_[at(head, index)]);
    whole(head, index).mass = -1.0F;
  }
  std::size_t bytes() const noexcept;
  // All records, for Arena::compact.
  void movable(std::vector<ScoreRecord*>& records) noexcept;

 private:
  std::size_t at(std::size_t head, std::size_t index) const noexcept { return (index - first_) * heads_ + head; }
  std::size_t blocks() const noexcept { return weights_.size(); }
  BlockScore& whole(std::size_t head, std::size_t index) const noexcept {
    const std::size_t page = index / ScoreRecord::kBlocks - first_ / ScoreRecord::kBlocks;
    return wholes_[page * heads_ + head].blocks()[index % ScoreRecord::kBlocks];
  }
  // Records per head that `count` blocks from first_ on take as wholes.
  std::size_t pages(std::size_t count) const noexcept;
  double keep_at(std::int64_t visible) const noexcept;
  bool is_held(std::size_t head, std::size_t index) const noexcept {
    return index >= first_ && index - first_ < blocks() && whole(head, index).mass >= 0.0F;
  }
  bool is_measured(std::size_t head, std::size_t index) const noexcept {
    return is_held(head, index) && weights_[index - first_] > 0.0;
  }

  std::size_t heads_;
  std::size_t head_dim_;
  double gamma_;
  bool wanted_;
  std::size_t first_ = 0;             // grid index of the first block held
  std::int64_t folded_at_ = 0;        // visible tokens at the last sample
  double keep_ = 0.0;                 // what the last sample left of the averages
  std::vector<ScoreRecord> records_;  // at(head, index); none where tokens are not told apart, or the block was evicted
  std::vector<ScoreRecord> wholes_;   // by page of grid indexes, then head
  bool is_external_;
  std::vector<double> external_;  // at(head, index), where they are
  std::vector<double> weights_;   // per block: what the average's weights sum to, 0 before the first sample
};

}  // namespace inferos::kv
