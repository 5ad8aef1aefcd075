#pragma once
// Which positions each block covers, the same for all layers of a kind (with or without sinks).
// Blocks follow one another without gaps; all are full but the last and those a rewind has closed.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/block.hpp"

namespace inferos::kv {

struct GridEntry {
  std::int32_t start;
  std::uint16_t tokens;
  bool closed;  // takes no more tokens although it is not full: part of it is packed

  std::int32_t end() const noexcept { return start + static_cast<std::int32_t>(tokens); }
  bool finished() const noexcept { return closed || tokens == kernels::kBlockTokens; }
};

class Grid {
 public:
  explicit Grid(std::int32_t origin) noexcept : origin_(origin) {}

  std::size_t size() const noexcept { return entries_.size(); }
  const GridEntry& operator[](std::size_t index) const noexcept { return entries_[index]; }
  std::int32_t origin() const noexcept { return origin_; }
  // Index of the block that covers `position`, which is within origin..end.
  std::size_t find(std::int64_t position) const noexcept;

  // Blocks that tokens up to `length` (exclusive) open behind the present ones; makes room for them, so that extend cannot fail.
  std::size_t prepare(std::int64_t length);
  void extend(std::int64_t length) noexcept;
  void truncate(std::int64_t length) noexcept;
  void close_last() noexcept { entries_.back().closed = true; }

  // Finished blocks whose last token is older than the newest `window` of `length` tokens: the first due() ones.
  void update_due(std::int64_t length, std::size_t window) noexcept;
  std::size_t due() const noexcept { return due_; }

 private:
  std::int32_t end() const noexcept { return entries_.empty() ? origin_ : entries_.back().end(); }
  std::int32_t last_room() const noexcept;

  std::int32_t origin_;
  std::size_t due_ = 0;
  std::vector<GridEntry> entries_;
};

}  // namespace inferos::kv
