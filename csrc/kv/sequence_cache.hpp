#pragma once
// The KV cache of one sequence: every layer, every kv head, in FP16 and packed blocks. DESIGN.md decisions 3 to 6.
//
// Positions 0..sink-1 sit in one FP16 sink block per head; behind it the grid: blocks of 64 positions. The newest
// `recent_window` tokens are FP16; a block whose last token is older than that is packed as a whole, when its layer is next called.
// A sliding-window layer (local_window >= 0) has no sinks and frees blocks that no later query can see, not even after a rewind by kRewindReserve.
//
// A step is a transaction:
//   begin(past, tokens)      the first layer called begins it; every memory a step may need, for all layers, is allocated here
//                            (packed blocks for those due, FP16 blocks beyond those that packing frees), so running out of budget precedes any change
//   append(layer, k, v)      once per layer: packs what is due in this layer, then writes the new tokens
//   commit()                 when all layers have appended; a step of which a layer is missing is dropped by the next begin
// A step that is never committed is rolled back by dropping FP16 tokens; packing is never undone (it changes no committed token's
// membership, and the undisturbed run would have packed the same block at the same step).
//
// Where a budget is used up, an `auto` cache makes room first (relief.hpp); any other refuses the step at once. A refused step
// leaves every token that was held before it, some blocks perhaps narrower.

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "core/arena.hpp"
#include "core/executor.hpp"
#include "kernels/block.hpp"
#include "kv/cache_options.hpp"
#include "kv/importance.hpp"
#include "kv/key_safety.hpp"
#include "kv/layer_store.hpp"
#include "kv/relief.hpp"
#include "kv/review.hpp"
#include "kv/token_statistics.hpp"

namespace inferos::kv {

// Tokens by which every sequence can be taken back: as many as a draft that was checked has, and more.
inline constexpr std::int64_t kRewindReserve = 16;

// Not thread-safe: the caller holds the sequence (registry.hpp's Lease).
class SequenceCache {
 public:
  SequenceCache(CacheOptions options, std::shared_ptr<Arena> arena);  // Error{kConfig}, Error{kShape}
  ~SequenceCache();
  SequenceCache(const SequenceCache&) = delete;
  SequenceCache& operator=(const SequenceCache&) = delete;

  const CacheOptions& options() const noexcept;
  std::int64_t length() const noexcept;   // committed tokens
  std::int64_t pending() const noexcept;  // tokens of the open step, 0 = none
  std::int64_t kept_from()
      const noexcept;  // first position that every layer still holds (sliding windows lose the past)
  std::int64_t rewind_floor()
      const noexcept;  // shortest length but 0 whose next token still sees all that its layers show it

  // For the op: the first call of a step begins it, later layers join. `past` says what the host believes is cached:
  //   past == length()                          a new step; an open one, whole or not, is dropped
  //   past >  length(), all layers appended     the open step is committed first (a host that never calls commit)
  //   past <  length()                          rewind(past) first
  // A layer that already ran in the open step also means a new step. Errors: kSequence (a gap, another past or count than the
  // open step's), kRewind, kBudget (every token still held), kShape.
  void enter(std::size_t layer, std::int64_t past, std::int64_t tokens);
  void begin(std::int64_t tokens);  // drops an open step, then begins one at length()
  // k, v: [tokens][kv_heads][head_dim] f32, keys already rotated by their position.
  void append(std::size_t layer, const float* k, const float* v, Executor& executor);
  void commit();  // Error{kSequence} unless every layer has appended
  void rollback() noexcept;

  // Whether the attention of this layer's appended step should yield its mass. If so, what each head's tokens received, [visible_length(layer)],
  // once for every head, in any order and on any thread; then mass_folded. Error{kShape} for a layer that is none.
  bool wants_mass(std::size_t layer) const;
  void fold_mass(std::size_t layer, std::size_t head, std::span<const float> mass) noexcept;
  void mass_folded(std::size_t layer) noexcept;
  // Averaged share of the head's attention of the block that covers a position behind the sinks; < 0 where it was not measured.
  double mass_at(std::size_t layer, std::size_t head, std::int64_t position) const;
  // Importance of a block of the grid; NaN where it is not known.
  double score(std::size_t layer, std::size_t head, std::size_t index) const;
  // Whether the queries of this layer's appended step should be used to see what INT4 keys do to its output; and what they said.
  bool wants_key_check(std::size_t layer) const;
  void keys_checked(std::size_t layer, const KeyError& error) noexcept;
  // What a block of the layer becomes at most, as things stand.
  Format narrowest(std::size_t layer) const;

  // Changes what `auto` goes by: in force from the next review, the window from the next step. `formats` as in the options.
  // Error{kSequence} while a step is open, Error{kConfig} and Error{kShape} for what is no policy or where there was none: nothing is changed.
  void set_policy(Policy policy, std::vector<Format> formats, std::size_t recent_window);
  // With Policy::external: the blocks' worth, [kv_heads][grid_blocks], NaN = unknown. Error{kConfig} otherwise, Error{kShape}.
  void set_scores(std::size_t layer, std::span<const double> scores);
  // Whether the next commit of one token reviews the layer.
  bool review_due(std::size_t layer) const;
  // Error{kShape}.
  TokenStatistics token_statistics(std::size_t layer, std::size_t head) const;
  // Positions start and end (exclusive) of a block of the grid.
  std::pair<std::int64_t, std::int64_t> block_span(std::size_t layer, std::size_t index) const;  // index < grid_blocks
  std::array<DemotionError, kernels::kFormats> demotion_errors() const;

  // Streams of the layer's heads, the open step's tokens included once appended.
  std::span<const HeadStreams> streams(std::size_t layer) const;
  std::int64_t visible_length(std::size_t layer) const;  // committed, plus pending once this layer has appended

  // Forgets positions >= length. A packed block stays packed with fewer valid tokens; the next token opens a new FP16 block.
  // Error{kRewind} before rewind_floor() or beyond length(); 0 is always possible. Drops an open step.
  void rewind(std::int64_t length);
  void clear();
  // A second sequence with the same tokens: packed blocks are shared, FP16 blocks copied. Drops no step: Error{kSequence} while one is open.
  std::unique_ptr<SequenceCache> fork() const;
  // One-way: the block at `index` of the grid of (layer, head) to a narrower format (INT8 -> K8V4 -> INT4, F16 -> any).
  // Returns false, and changes nothing, where it is not narrower, is in the window, or is not held any more.
  // Error{kSequence} while a step is open, Error{kShape} for an index that is none, Error{kBudget}: nothing is changed.
  bool demote(std::size_t layer, std::size_t head, std::size_t index, Format format);
  // The block leaves the cache: attention does not see its tokens any more, and rewind_floor() lies behind them. Errors and false as demote.
  bool evict(std::size_t layer, std::size_t head, std::size_t index);
  // The largest share of a head's attention that its evicted blocks had when they went; NaN where that was not measured.
  double evicted_mass() const;
  std::size_t grid_blocks(std::size_t layer) const;

  // One committed token back, dequantised, un-rotated: k[head_dim], v[head_dim]. Error{kShape}.
  void read(std::size_t layer, std::size_t head, std::int64_t position, float* k, float* v, Format* format) const;
  TierBytes tier_bytes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace inferos::kv
