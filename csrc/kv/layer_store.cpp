#include "kv/layer_store.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <new>
#include <utility>

#include "kernels/codec.hpp"
#include "kv/room.hpp"

namespace inferos::kv {
namespace {

constexpr std::size_t index_of(Format format) noexcept { return static_cast<std::size_t>(format); }
constexpr std::size_t kF16 = index_of(Format::kF16);
constexpr std::int64_t kSharedTokens = 32;  // fewer are written in less time than another thread takes to wake up

std::size_t sink_capacity(std::size_t sink_tokens) noexcept { return (sink_tokens + 15) / 16 * 16; }

BlockView view_of(const Block& block, std::int32_t start, std::size_t end) noexcept {
  return {block.data(), start, 0, static_cast<std::uint16_t>(end), block.capacity()};
}

std::vector<BlockView>::iterator at_start(std::vector<BlockView>& views, std::int32_t start) noexcept {
  return std::lower_bound(views.begin(), views.end(), start,
                          [](const BlockView& view, std::int32_t position) { return view.start < position; });
}

}  // namespace

LayerStore::LayerStore(const LayerShape& shape, Format leaving, std::size_t sink_tokens)
    : shape_(shape), leaving_(leaving), sink_tokens_(sink_tokens), heads_(shape.kv_heads), streams_(shape.kv_heads) {}

Reservation LayerStore::reserve(Arena& arena, const Grid& grid, std::vector<Demotion> demotions, std::size_t fresh,
                                bool sinks) {
  Reservation taken;
  for (Demotion& demotion : demotions) {
    demotion.block = std::make_shared<Block>(arena, demotion.format, shape_.head_dim, kBlockTokens);
    make_room(streams_[demotion.head].by_format[index_of(demotion.format)], demotions.size());
  }
  taken.demotions = std::move(demotions);
  // Head by head, so that a head's blocks follow each other in memory: a stream that jumps is read a tenth slower.
  const std::size_t due = leaving_ == Format::kF16 ? 0 : grid.due();
  const std::size_t from = std::min(std::max(settled_, first_), due);
  if (from < due) taken.packed.resize(heads_.size());
  for (std::size_t h = 0; h < taken.packed.size(); ++h) {
    for (std::size_t index = from; index < due; ++index) {
      if (!holds(h, index) || format(h, index) != Format::kF16) continue;
      taken.packed[h].push_back(std::make_shared<Block>(arena, leaving_, shape_.head_dim, kBlockTokens));
    }
  }
  for (std::size_t i = 0; sinks && i < heads_.size(); ++i) {
    taken.sinks.push_back(std::make_shared<Block>(arena, Format::kF16, shape_.head_dim, sink_capacity(sink_tokens_)));
  }
  // A block that is packed gives its FP16 memory to a new entry of its head: it is in the cache, and half as much is held at the peak.
  taken.entries = fresh;
  taken.fresh.resize(heads_.size());
  for (std::size_t h = 0; h < heads_.size(); ++h) {
    std::vector<BlockPtr>& own = taken.fresh[h];
    own.reserve(fresh);
    for (std::size_t i = taken.packed.empty() ? 0 : taken.packed[h].size(); i < fresh; ++i) {
      own.push_back(std::make_shared<Block>(arena, Format::kF16, shape_.head_dim, kBlockTokens));
    }
  }
  for (std::size_t h = 0; h < heads_.size(); ++h) {
    make_room(heads_[h].blocks, fresh);
    make_room(streams_[h].by_format[kF16], fresh + 1);
    make_room(streams_[h].by_format[index_of(leaving_)], due - from + taken.demotions.size());
  }
  return taken;
}

void LayerStore::append(const Grid& grid, Reservation& reservation, std::int64_t from, std::int64_t to, const float* k,
                        const float* v, Executor& executor) {
  place_sinks(reservation);
  struct Call {
    LayerStore& store;
    const Grid& grid;
    Reservation& reservation;
    std::int64_t from, to;
    const float* k;
    const float* v;
    std::atomic<bool> out_of_memory{false};

    static void run(void* context, std::size_t head) noexcept {
      auto& call = *static_cast<Call*>(context);
      try {
        call.store.settle(call.grid, head, call.reservation);
        if (call.reservation.entries != 0) call.store.place_fresh(head, call.reservation);
        call.store.write(call.grid, head, call.from, call.to, call.k, call.v);
      } catch (const std::bad_alloc&) {
        call.out_of_memory.store(true, std::memory_order_relaxed);
      }
    }
  };
  Call call{*this, grid, reservation, from, to, k, v};
  SerialExecutor alone;
  const bool shared = to - from >= kSharedTokens || !reservation.packed.empty() || !reservation.demotions.empty();
  (shared ? executor : alone).parallel_for(heads_.size(), &Call::run, &call);
  if (call.out_of_memory.load()) throw std::bad_alloc();
  settled_ = std::max(settled_, grid.due());
}

void LayerStore::place_sinks(Reservation& reservation) noexcept {
  for (std::size_t h = 0; h < reservation.sinks.size(); ++h) {
    heads_[h].sink = std::move(reservation.sinks[h]);
    streams_[h].by_format[kF16].push_back(view_of(*heads_[h].sink, 0, 0));
  }
}

void LayerStore::place_fresh(std::size_t head, Reservation& reservation) noexcept {
  std::vector<BlockPtr>& own = reservation.fresh[head];
  std::move(own.begin(), own.end(), std::back_inserter(heads_[head].blocks));
}

void LayerStore::settle(const Grid& grid, std::size_t head, Reservation& reservation) {
  std::size_t next = 0;
  for (std::size_t index = std::max(settled_, first_); index < grid.due() && leaving_ != Format::kF16; ++index) {
    BlockPtr old = heads_[head].blocks[index - first_];
    if (old == nullptr || old->format() != Format::kF16) continue;
    BlockPtr& packed = reservation.packed[head][next++];
    const Block* following = index + 1 < grid.due() ? heads_[head].blocks[index + 1 - first_].get() : nullptr;
    convert_block(*old, grid[index].tokens, shape_.head_dim, *packed, following);
    replace(head, grid[index], index, std::move(packed));
    if (reservation.fresh[head].size() < reservation.entries) reservation.fresh[head].push_back(std::move(old));
  }
  for (Demotion& demotion : reservation.demotions) {
    if (demotion.head != head) continue;
    const Block& old = *heads_[head].blocks[demotion.index - first_];
    if (old.format() >= demotion.format) continue;  // what was due has just become that narrow
    demote_block(grid, head, demotion.index, *demotion.block);
    replace(head, grid[demotion.index], demotion.index, std::move(demotion.block));
  }
}

void LayerStore::write(const Grid& grid, std::size_t head, std::int64_t from, std::int64_t to, const float* k,
                       const float* v) noexcept {
  const std::size_t d = shape_.head_dim;
  const std::size_t row = shape_.kv_heads * d;
  const auto put = [&](const Block& block, std::int64_t start, std::int64_t begin, std::int64_t end) {
    const std::size_t offset = static_cast<std::size_t>(begin - from) * row + head * d;
    kernels::store_f16_tokens(block.data(), d, block.capacity(), static_cast<std::size_t>(begin - start),
                              static_cast<std::size_t>(end - begin), k + offset, v + offset, row);
  };
  const std::int64_t sink_end = std::min<std::int64_t>(static_cast<std::int64_t>(sink_tokens_), to);
  std::vector<BlockView>& views = streams_[head].by_format[kF16];
  if (from < sink_end) {
    put(*heads_[head].sink, 0, from, sink_end);
    views.front().end = static_cast<std::uint16_t>(sink_end);
  }
  for (std::int64_t p = std::max<std::int64_t>(from, grid.origin()); p < to;) {
    const std::size_t index = grid.find(p);
    const GridEntry& entry = grid[index];
    const Block& block = *heads_[head].blocks[index - first_];
    const std::int64_t end = std::min<std::int64_t>(entry.end(), to);
    if (end < to) {
      const auto ahead = static_cast<std::size_t>(std::min<std::int64_t>(to - end, kBlockTokens));
      const std::size_t following = static_cast<std::size_t>(end - from) * row + head * d;
      kernels::prefetch_rows(k + following, row, d, ahead);
      kernels::prefetch_rows(v + following, row, d, ahead);
    }
    put(block, entry.start, p, end);
    if (views.empty() || views.back().start != entry.start) views.push_back(view_of(block, entry.start, 0));
    views.back().end = static_cast<std::uint16_t>(end - entry.start);
    p = end;
  }
}

// Both versions are there: of every 4th block their difference is taken. Evenly over the heads, and by place only.
void LayerStore::demote_block(const Grid& grid, std::size_t head, std::size_t index, Block& to) {
  constexpr std::size_t kSampled = 4;
  const Block& from = *heads_[head].blocks[index - first_];
  convert_block(from, grid[index].tokens, shape_.head_dim, to);
  if ((index + head) % kSampled != 0) return;
  const BlockError error = block_error(from, to, grid[index].tokens, shape_.head_dim);
  DemotionError& sum = heads_[head].errors[index_of(to.format())];
  sum.blocks += 1;
  sum.k += error.k;
  sum.v += error.v;
}

void LayerStore::add_errors(std::array<DemotionError, kernels::kFormats>& total) const noexcept {
  for (const Head& head : heads_) {
    for (std::size_t f = 0; f < kernels::kFormats; ++f) {
      total[f].blocks += head.errors[f].blocks;
      total[f].k += head.errors[f].k;
      total[f].v += head.errors[f].v;
    }
  }
}

void LayerStore::replace(std::size_t head, const GridEntry& entry, std::size_t index, BlockPtr packed) noexcept {
  BlockPtr& held = heads_[head].blocks[index - first_];
  auto& from = streams_[head].by_format[index_of(held->format())];
  auto& to = streams_[head].by_format[index_of(packed->format())];
  from.erase(at_start(from, entry.start));
  to.insert(at_start(to, entry.start), view_of(*packed, entry.start, entry.tokens));
  held = std::move(packed);
}

void LayerStore::truncate(const Grid& grid, std::int64_t length) noexcept {
  settled_ = std::min(settled_, std::max<std::size_t>(grid.size(), 1) - 1);
  if (grid.size() < first_) first_ = 0;  // only where everything goes: what was freed cannot be gone back to
  for (std::size_t h = 0; h < heads_.size(); ++h) {
    for (std::vector<BlockView>& views : streams_[h].by_format) {
      while (!views.empty() && views.back().start >= length) views.pop_back();
      if (!views.empty()) {
        BlockView& last = views.back();
        last.end = static_cast<std::uint16_t>(std::min<std::int64_t>(last.end, length - last.start));
      }
    }
    std::vector<BlockPtr>& blocks = heads_[h].blocks;
    while (blocks.size() > grid.size() - first_) blocks.pop_back();
    if (length == 0) heads_[h].sink.reset();
  }
}

void LayerStore::forget_before(const Grid& grid, std::int64_t position) noexcept {
  std::size_t first = first_;
  while (first + 1 < grid.size() && grid[first].end() <= position) ++first;
  if (first == first_) return;
  const std::int32_t start = grid[first].start;
  for (std::size_t h = 0; h < heads_.size(); ++h) {
    for (std::vector<BlockView>& views : streams_[h].by_format) views.erase(views.begin(), at_start(views, start));
    std::vector<BlockPtr>& blocks = heads_[h].blocks;
    blocks.erase(blocks.begin(), blocks.begin() + static_cast<std::ptrdiff_t>(first - first_));
  }
  first_ = first;
}

bool LayerStore::any_packed(std::size_t index) const noexcept {
  if (index < first_) return false;
  return std::any_of(heads_.begin(), heads_.end(), [&](const Head& head) {
    const BlockPtr& block = head.blocks[index - first_];
    return block == nullptr || block->format() != Format::kF16;
  });
}

bool LayerStore::demote(Arena& arena, const Grid& grid, std::size_t head, std::size_t index, Format format) {
  if (!holds(head, index)) return false;
  const Block& old = *heads_[head].blocks[index - first_];
  if (format <= old.format()) return false;
  auto packed = std::make_shared<Block>(arena, format, shape_.head_dim, kBlockTokens);
  make_room(streams_[head].by_format[index_of(format)], 1);
  demote_block(grid, head, index, *packed);
  replace(head, grid[index], index, std::move(packed));
  return true;
}

BlockPtr LayerStore::evict(const Grid& grid, std::size_t head, std::size_t index) noexcept {
  if (!holds(head, index)) return nullptr;
  BlockPtr& held = heads_[head].blocks[index - first_];
  auto& views = streams_[head].by_format[index_of(held->format())];
  views.erase(at_start(views, grid[index].start));
  return std::exchange(held, nullptr);
}

void LayerStore::put_back(const Grid& grid, std::size_t head, std::size_t index, BlockPtr block) {
  auto& views = streams_[head].by_format[index_of(block->format())];
  const GridEntry& entry = grid[index];
  views.insert(at_start(views, entry.start), view_of(*block, entry.start, entry.tokens));
  heads_[head].blocks[index - first_] = std::move(block);
}

std::int64_t LayerStore::evicted_end(const Grid& grid) const noexcept {
  std::size_t evicted = 0;  // entries behind first_, up to the last evicted one
  for (const Head& head : heads_) {
    for (std::size_t i = head.blocks.size(); i > evicted; --i) {
      if (head.blocks[i - 1] == nullptr) evicted = i;
    }
  }
  return evicted == 0 ? 0 : grid[first_ + evicted - 1].end();
}

void LayerStore::movable(std::size_t bytes, std::vector<Place>& places, std::vector<const std::byte*>& data) const {
  for (std::size_t h = 0; h < heads_.size(); ++h) {
    for (std::size_t i = 0; i < heads_[h].blocks.size(); ++i) {
      const BlockPtr& block = heads_[h].blocks[i];
      if (block == nullptr || block->bytes() != bytes || block.use_count() > 1) continue;
      places.push_back({h, first_ + i});
      data.push_back(block->data());
    }
  }
}

void LayerStore::move(const Grid& grid, const Place& place, std::byte* to) noexcept {
  Block& block = *heads_[place.head].blocks[place.index - first_];
  block.move_to(to);
  at_start(streams_[place.head].by_format[index_of(block.format())], grid[place.index].start)->data = to;
}

LayerStore LayerStore::fork(Arena& arena) const {
  LayerStore copy(*this);
  const auto duplicate = [&](const BlockPtr& block) {
    auto fresh = std::make_shared<Block>(arena, Format::kF16, shape_.head_dim, block->capacity());
    std::memcpy(fresh->data(), block->data(), block->bytes());
    return fresh;
  };
  for (std::size_t h = 0; h < heads_.size(); ++h) {
    auto view = copy.streams_[h].by_format[kF16].begin();  // ascending, as the blocks are
    if (heads_[h].sink != nullptr) {
      copy.heads_[h].sink = duplicate(heads_[h].sink);
      (view++)->data = copy.heads_[h].sink->data();
    }
    for (BlockPtr& block : copy.heads_[h].blocks) {
      if (block == nullptr || block->format() != Format::kF16) continue;
      block = duplicate(block);
      (view++)->data = block->data();
    }
  }
  return copy;
}

void LayerStore::read(const Grid& grid, std::size_t head, std::int64_t position, float* k, float* v,
                      Format* format) const {
  const bool in_sink = position < static_cast<std::int64_t>(sink_tokens_);
  const std::size_t index = in_sink ? 0 : grid.find(position);
  const Block& block = in_sink ? *heads_[head].sink : *heads_[head].blocks[index - first_];
  const std::int64_t start = in_sink ? 0 : grid[index].start;
  read_block(block, static_cast<std::size_t>(position - start), shape_.head_dim, k, v);
  if (format != nullptr) *format = block.format();
}

void LayerStore::count(const Grid& grid, TierBytes& total) const noexcept {
  const auto add = [&](const BlockPtr& block) {
    const std::size_t f = index_of(block->format());
    total.blocks[f] += 1;
    total.bytes[f] += block->bytes();
    if (block.use_count() > 1) total.shared_bytes += block->bytes();
  };
  for (std::size_t h = 0; h < heads_.size(); ++h) {
    if (heads_[h].sink != nullptr) add(heads_[h].sink);
    for (std::size_t i = 0; i < heads_[h].blocks.size(); ++i) {
      const BlockPtr& block = heads_[h].blocks[i];
      if (block != nullptr) {
        add(block);
      } else {
        total.evicted += grid[first_ + i].tokens;
      }
    }
    for (std::size_t f = 0; f < kernels::kFormats; ++f) {
      for (const BlockView& view : streams_[h].by_format[f]) {
        total.tokens[f] += view.end;
        total.elements += 2 * shape_.head_dim * view.end;
      }
    }
  }
}

}  // namespace inferos::kv
