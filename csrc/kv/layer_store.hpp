#pragma once
// The blocks of one layer and the streams the kernels read. Everything that can fail is done in reserve(); the rest moves pointers.

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/executor.hpp"
#include "kernels/attend.hpp"
#include "kv/block.hpp"
#include "kv/grid.hpp"

namespace inferos::kv {

struct LayerShape {
  std::size_t kv_heads;  // 1..1024
  std::size_t head_dim;  // multiple of 16 in 16..256
  std::int32_t
      local_window;  // -1 = all tokens; else the newest local_window + 1 positions (the query's own included) are visible
};

// Blocks of one (layer, kv head), by format; the order inside a format is ascending in position.
struct HeadStreams {
  std::array<std::vector<BlockView>, kernels::kFormats> by_format;
};

struct TierBytes {
  std::array<std::size_t, kernels::kFormats> blocks;  // by Format, all layers and heads
  std::array<std::size_t, kernels::kFormats> bytes;   // as held in the arena; shared blocks count once per holder
  std::array<std::size_t, kernels::kFormats> tokens;  // token-heads: valid tokens summed over layers and heads
  std::size_t elements;                               // K and V values of those tokens
  std::size_t shared_bytes;                           // part of `bytes` that a fork shares
  std::size_t score_bytes;                            // importance scores
  std::size_t evicted;                                // token-heads that were evicted
};

// What demotion to a format does to blocks, of those that were measured: a fourth of them.
struct DemotionError {
  std::size_t blocks = 0;
  double k = 0.0;  // sum over the blocks of |new - old|^2 / |old|^2
  double v = 0.0;
};

// A block of one head that is to become narrower.
struct Demotion {
  std::size_t head;
  std::size_t index;  // in the grid
  Format format;
  BlockPtr block;  // where it goes to
};

// Memory one step may need in one layer, taken before the step changes anything.
struct Reservation {
  std::vector<std::vector<BlockPtr>> packed;  // by head, for the blocks that are due
  std::vector<Demotion> demotions;
  std::vector<BlockPtr> sinks;               // one per head, or none
  std::vector<std::vector<BlockPtr>> fresh;  // by head, for new grid entries; what is due gives up the rest of them
  std::size_t entries = 0;                   // new grid entries
};

class LayerStore {
 public:
  LayerStore(const LayerShape& shape, Format leaving, std::size_t sink_tokens);

  const LayerShape& shape() const noexcept { return shape_; }
  std::size_t sink_tokens() const noexcept { return sink_tokens_; }
  std::span<const HeadStreams> streams() const noexcept { return streams_; }
  std::size_t first() const noexcept { return first_; }  // first grid index still held

  void set_leaving(Format leaving) noexcept { leaving_ = leaving; }
  bool is_behind(const Grid& grid) const noexcept { return settled_ < grid.due(); }
  std::size_t settled() const noexcept { return settled_; }  // grid indexes below it were offered to packing
  // Blocks for what is due, for `demotions`, for `fresh` new grid entries (and the sinks, where `sinks`), and room in every list.
  Reservation reserve(Arena& arena, const Grid& grid, std::vector<Demotion> demotions, std::size_t fresh, bool sinks);
  // Packs what is due, then what was demoted; takes over the new blocks and writes tokens from..to-1 of the grid, which covers
  // them already. k, v: [to - from][kv_heads][head_dim]. Head by head where that is worth sharing.
  void append(const Grid& grid, Reservation& reservation, std::int64_t from, std::int64_t to, const float* k,
              const float* v, Executor& executor);

  // After the grid was truncated to `length`.
  void truncate(const Grid& grid, std::int64_t length) noexcept;
  // Frees blocks before `position`, never the last one.
  void forget_before(const Grid& grid, std::int64_t position) noexcept;
  // Whether a head still holds a block of the grid: neither forgotten nor evicted.
  bool holds(std::size_t head, std::size_t index) const noexcept {
    return index >= first_ && heads_[head].blocks[index - first_] != nullptr;
  }
  Format format(std::size_t head, std::size_t index) const noexcept {
    return heads_[head].blocks[index - first_]->format();
  }
  std::size_t block_bytes(std::size_t head, std::size_t index) const noexcept {
    return heads_[head].blocks[index - first_]->bytes();
  }
  bool is_shared(std::size_t head, std::size_t index) const noexcept {
    return heads_[head].blocks[index - first_].use_count() > 1;
  }
  // Whether a head holds block `index` packed, or not at all.
  bool any_packed(std::size_t index) const noexcept;
  // False, and nothing is changed, where the block is not held or not wider than that. Error{kBudget}.
  bool demote(Arena& arena, const Grid& grid, std::size_t head, std::size_t index, Format format);
  // The block leaves the cache: attention does not see its tokens any more. nullptr where it is not held. Noexcept but for put_back.
  BlockPtr evict(const Grid& grid, std::size_t head, std::size_t index) noexcept;
  void put_back(const Grid& grid, std::size_t head, std::size_t index, BlockPtr block);
  // One past the last evicted position, 0 where none is.
  std::int64_t evicted_end(const Grid& grid) const noexcept;
  // The heads' blocks of `bytes` that no fork shares, and what to do when the i-th of them was moved.
  struct Place {
    std::size_t head;
    std::size_t index;
  };
  void movable(std::size_t bytes, std::vector<Place>& places, std::vector<const std::byte*>& data) const;
  void move(const Grid& grid, const Place& place, std::byte* to) noexcept;

  // Packed blocks shared, FP16 blocks copied.
  LayerStore fork(Arena& arena) const;
  void read(const Grid& grid, std::size_t head, std::int64_t position, float* k, float* v, Format* format) const;
  void count(const Grid& grid, TierBytes& total) const noexcept;
  // What demotions changed, added to `total`.
  void add_errors(std::array<DemotionError, kernels::kFormats>& total) const noexcept;

 private:
  struct Head {
    BlockPtr sink;
    std::array<DemotionError, kernels::kFormats> errors{};
    std::vector<BlockPtr> blocks;  // grid index - first_; nullptr = evicted
  };

  void place_sinks(Reservation& reservation) noexcept;
  void place_fresh(std::size_t head, Reservation& reservation) noexcept;
  void settle(const Grid& grid, std::size_t head, Reservation& reservation);
  void write(const Grid& grid, std::size_t head, std::int64_t from, std::int64_t to, const float* k,
             const float* v) noexcept;
  void demote_block(const Grid& grid, std::size_t head, std::size_t index, Block& to);
  void replace(std::size_t head, const GridEntry& entry, std::size_t index, BlockPtr packed) noexcept;

  LayerShape shape_;
  Format leaving_;  // what a block becomes when it leaves the window
  std::size_t sink_tokens_;
  std::size_t first_ = 0;
  std::size_t settled_ = 0;
  std::vector<Head> heads_;
  std::vector<HeadStreams> streams_;
};

}  // namespace inferos::kv
