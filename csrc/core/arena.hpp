#pragma once
// Budgeted memory for KV blocks.
//
// Blocks of one size share slabs; a slab comes from the operating system in one piece, 64-byte aligned blocks inside,
// and goes back when its last block is released. Slabs grow from 64 KiB to 2 MiB with the arena, so that a small
// cache wastes little and a large one sits on huge pages (madvise on Linux; plain pages elsewhere).
// The budget caps reserved bytes (slabs), which is what the process really pays; under one slabs stay small, because a slab serves one size.
// Nothing is ever reallocated, and moved only by compact().

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace inferos {

// What a block is for; only accounting depends on it.
enum class ArenaTag : std::uint8_t { kF16 = 0, kInt8 = 1, kK8V4 = 2, kInt4 = 3, kScore = 4 };
inline constexpr std::size_t kArenaTags = 5;

struct ArenaStats {
  std::size_t budget_bytes;    // 0 = no limit
  std::size_t reserved_bytes;  // slabs held from the operating system
  std::size_t reserved_high_water_bytes;
  std::size_t used_bytes;  // live blocks
  std::size_t used_high_water_bytes;
  std::array<std::size_t, kArenaTags> used_by_tag;  // live blocks by purpose
  std::size_t live_blocks;
  std::size_t slabs;
  std::size_t huge_slabs;  // slabs for which the OS was asked for, and accepted, huge pages
};

// Thread-safe. Allocation happens once every 64 tokens, so one mutex is enough.
class Arena {
 public:
  explicit Arena(std::size_t budget_bytes, bool huge_pages = true);  // Error{kConfig} where 0 < budget < 64 KiB
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // A block of `bytes` (rounded up to 64), 64-byte aligned, contents unspecified.
  // Throws Error{kBudget} naming the request, the use and the budget; nothing is changed then.
  std::byte* allocate(std::size_t bytes, ArenaTag tag);
  // `block` and its size and tag as given to allocate.
  void release(std::byte* block, std::size_t bytes, ArenaTag tag) noexcept;

  std::size_t budget() const noexcept;  // 0 = no limit
  // Another budget from now on, after empty slabs went back; never less than what is reserved then. Returns it.
  std::size_t set_budget(std::size_t budget_bytes);
  // Bytes reserved, and those of live blocks.
  std::pair<std::size_t, std::size_t> occupied() const;
  // Bytes of the budget that no slab with blocks in it holds; SIZE_MAX without a budget.
  std::size_t available() const;
  // Bytes of a full-grown slab of blocks of `bytes` under the budget.
  std::size_t largest_slab(std::size_t bytes) const noexcept;
  // Sizes of blocks that fit into fewer slabs than they lie in.
  std::vector<std::size_t> sparse_sizes() const;
  // Empties slabs of blocks of `bytes` and gives them back. `blocks`: those that may move; a slab that holds others stays.
  // move(i, to) copies blocks[i], which must then be used at `to` alone; it must not throw nor use the arena. Returns the slabs given back.
  std::size_t compact(std::size_t bytes, std::span<const std::byte* const> blocks,
                      const std::function<void(std::size_t, std::byte*)>& move);

  ArenaStats stats() const;
  // Test seam: the n-th allocation from now (1 = the next) throws Error{kBudget}; 0 switches it off.
  void fail_after(std::size_t n) noexcept;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace inferos
