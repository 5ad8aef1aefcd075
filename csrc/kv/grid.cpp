#include "kv/grid.hpp"

#include <algorithm>

#include "kv/room.hpp"

namespace inferos::kv {
namespace {

constexpr std::int32_t kFull = static_cast<std::int32_t>(kernels::kBlockTokens);

}  // namespace

std::int32_t Grid::last_room() const noexcept {
  return entries_.empty() || entries_.back().finished() ? 0 : kFull - entries_.back().tokens;
}

std::size_t Grid::find(std::int64_t position) const noexcept {
  if (position >= entries_.back().start) return entries_.size() - 1;  // where decoding writes
  const auto after = std::upper_bound(entries_.begin(), entries_.end(), position,
                                      [](std::int64_t p, const GridEntry& entry) { return p < entry.start; });
  return static_cast<std::size_t>(after - entries_.begin()) - 1;
}

std::size_t Grid::prepare(std::int64_t length) {
  const std::int64_t missing = length - end() - last_room();
  if (missing <= 0) return 0;
  const std::size_t count = static_cast<std::size_t>((missing + kFull - 1) / kFull);
  make_room(entries_, count);
  return count;
}

void Grid::extend(std::int64_t length) noexcept {
  std::int64_t missing = length - end();
  if (missing <= 0) return;
  const std::int64_t joined = std::min<std::int64_t>(missing, last_room());
  if (joined > 0) entries_.back().tokens = static_cast<std::uint16_t>(entries_.back().tokens + joined);
  for (missing -= joined; missing > 0; missing -= kFull) {
    entries_.push_back({end(), static_cast<std::uint16_t>(std::min<std::int64_t>(missing, kFull)), false});
  }
}

void Grid::truncate(std::int64_t length) noexcept {
  while (!entries_.empty() && entries_.back().start >= length) entries_.pop_back();
  if (!entries_.empty() && entries_.back().end() > length) {
    entries_.back().tokens = static_cast<std::uint16_t>(length - entries_.back().start);
  }
  due_ = std::min(due_, entries_.size());
  // The last block may be writable again, and then it is not due.
  while (due_ > 0 && !entries_[due_ - 1].finished()) --due_;
}

void Grid::update_due(std::int64_t length, std::size_t window) noexcept {
  const std::int64_t limit = length - static_cast<std::int64_t>(window);
  const auto is_due = [&](const GridEntry& entry) { return entry.finished() && entry.end() - 1 < limit; };
  while (due_ > 0 && !is_due(entries_[due_ - 1])) --due_;  // after a rewind
  while (due_ < entries_.size() && is_due(entries_[due_])) ++due_;
}

}  // namespace inferos::kv
