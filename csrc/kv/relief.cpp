#include "kv/relief.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <utility>

#include "core/error.hpp"

namespace inferos::kv {

bool compact(Arena& arena, std::span<const ReliefLayer> layers) {
  std::size_t emptied = 0;
  for (const std::size_t bytes : arena.sparse_sizes()) {
    std::vector<LayerStore::Place> places;
    std::vector<const std::byte*> data;
    std::vector<std::size_t> ends;  // of each layer, in places
    for (const ReliefLayer& layer : layers) {
      layer.store.movable(bytes, places, data);
      ends.push_back(places.size());
    }
    std::vector<ScoreRecord*> records;
    if (bytes == ScoreRecord::kBytes) {
      for (const ReliefLayer& layer : layers) layer.scores.movable(records);
    }
    for (const ScoreRecord* record : records) data.push_back(record->data());
    if (data.empty()) continue;
    emptied += arena.compact(bytes, data, [&](std::size_t i, std::byte* to) {
      if (i >= places.size()) return records[i - places.size()]->move_to(to);
      const auto layer = static_cast<std::size_t>(std::upper_bound(ends.begin(), ends.end(), i) - ends.begin());
      layers[layer].store.move(layers[layer].grid, places[i], to);
    });
  }
  return emptied != 0;
}

Relief::Relief(Arena& arena, std::vector<ReliefLayer> layers, std::size_t headroom, Eviction eviction,
               Overflow overflow, std::function<std::size_t()> need)
    : arena_(arena),
      layers_(std::move(layers)),
      headroom_(headroom),
      eviction_(eviction),
      overflow_(overflow),
      need_(std::move(need)) {}

Relief::~Relief() { take_back(); }

bool Relief::narrow() {
  if (!std::exchange(compacted_, true) && compact(arena_, layers_)) return true;
  if (!demote_some()) return false;
  compact(arena_, layers_);
  return true;
}

bool Relief::evict() {
  if (!evict_some()) return false;
  compact(arena_, layers_);
  return true;
}

// Every block outside the window that this sequence alone holds, least important first.
std::vector<Relief::Candidate> Relief::candidates() {
  std::vector<Candidate> found;
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const ReliefLayer& layer = layers_[l];
    if (layer.review.narrowest() == Format::kF16) continue;
    layer.review.measure(layer.grid, layer.scores);
    for (std::size_t head = 0; head < layer.store.shape().kv_heads; ++head) {
      const auto ranked = layer.review.rank(layer.grid, layer.store, head);
      const std::size_t lowest = layer.review.evictable_blocks(ranked.size());
      for (std::size_t i = 0; i < ranked.size(); ++i) {
        const std::size_t index = ranked[i].index;
        if (!layer.store.holds(head, index) || layer.store.is_shared(head, index)) continue;
        const double rank = (static_cast<double>(i) + 0.5) / static_cast<double>(ranked.size());
        const bool low = i < lowest && ranked[i].measured;
        found.push_back({rank, l, head, index, low, low && layer.review.may_go(head, index)});
      }
    }
  }
  std::sort(found.begin(), found.end(), [](const Candidate& a, const Candidate& b) {
    return std::tie(a.rank, a.layer, a.head, a.index) < std::tie(b.rank, b.layer, b.head, b.index);
  });
  return found;
}

void Relief::plan_demotions() {
  demotions_planned_ = true;
  demotions_ = candidates();
  std::erase_if(demotions_, [&](const Candidate& c) {
    const ReliefLayer& layer = layers_[c.layer];
    return layer.store.format(c.head, c.index) >= layer.review.narrowest();
  });
}

bool Relief::demote_some() {
  if (!demotions_planned_) plan_demotions();
  std::size_t given_up = 0;  // bytes
  bool any = false;
  for (; next_demotion_ < demotions_.size() && given_up < headroom_; ++next_demotion_) {
    const Candidate& c = demotions_[next_demotion_];
    const ReliefLayer& layer = layers_[c.layer];
    const std::size_t bytes = layer.store.block_bytes(c.head, c.index);
    try {
      if (!layer.store.demote(arena_, layer.grid, c.head, c.index, layer.review.narrowest())) continue;
      if (LayerReview::level_of(layer.review.narrowest()) == Level::kL2) {
        layer.scores.coarsen(layer.grid, c.head, c.index);
      }
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kBudget) throw;
      return any;
    }
    given_up += bytes;
    demoted_ += 1;
    any = true;
  }
  return any;
}

void Relief::plan_evictions() {
  evictions_planned_ = true;
  std::vector<Candidate> found = candidates();
  std::erase_if(found, [&](const Candidate& c) {
    const ReliefLayer& layer = layers_[c.layer];
    return !layer.review.evictable() || layer.store.format(c.head, c.index) != layer.review.narrowest();
  });
  // Blocks with a verdict first, then those that are low now, while the guard allows; then the others.
  std::sort(found.begin(), found.end(), [](const Candidate& a, const Candidate& b) {
    return std::tie(b.verdict, a.rank, a.layer, a.head, a.index) <
           std::tie(a.verdict, b.rank, b.layer, b.head, b.index);
  });
  std::vector<std::vector<double>> mass;  // by layer and head: evicted so far, infinite once the guard has spoken
  for (const ReliefLayer& layer : layers_) {
    auto& heads = mass.emplace_back();
    for (std::size_t h = 0; h < layer.store.shape().kv_heads; ++h) heads.push_back(layer.review.evicted_mass(h));
  }
  std::vector<Candidate> beyond;
  for (const Candidate& c : found) {
    double& sum = mass[c.layer][c.head];
    const double own = layers_[c.layer].scores.mass(layers_[c.layer].grid, c.head, c.index);
    if (c.low && own >= 0.0 && sum + own <= kGuard) {
      sum += own;
      evictions_.push_back(c);
      continue;
    }
    if (c.low) {
      sum = std::numeric_limits<double>::infinity();
      guarded_ = true;
    }
    beyond.push_back(c);
  }
  if (overflow_ == Overflow::kEvict) {
    std::sort(beyond.begin(), beyond.end(), [](const Candidate& a, const Candidate& b) {
      return std::tie(a.rank, a.layer, a.head, a.index) < std::tie(b.rank, b.layer, b.head, b.index);
    });
    evictions_.insert(evictions_.end(), beyond.begin(), beyond.end());
  }
  std::size_t bytes = 0;
  for (const Candidate& c : evictions_) bytes += layers_[c.layer].store.block_bytes(c.head, c.index);
  for (std::size_t i = next_demotion_; i < demotions_.size(); ++i) {  // they may find room then
    const ReliefLayer& layer = layers_[demotions_[i].layer];
    bytes += layer.store.block_bytes(demotions_[i].head, demotions_[i].index);
    bytes -= kernels::block_bytes(layer.review.narrowest(), layer.store.shape().head_dim);
  }
  if (arena_.stats().used_bytes + need_() > arena_.budget() + bytes) evictions_.clear();  // it would be for nothing
}

bool Relief::evict_some() {
  if (eviction_ == Eviction::kNever) return false;
  if (!evictions_planned_) plan_evictions();
  std::size_t freed = 0;
  for (; next_eviction_ < evictions_.size() && freed < headroom_ / 2; ++next_eviction_) {
    const Candidate& c = evictions_[next_eviction_];
    const ReliefLayer& layer = layers_[c.layer];
    const double mass = layer.scores.mass(layer.grid, c.head, c.index);
    evicted_.reserve(evictions_.size());
    std::vector<std::byte> bytes(layer.store.block_bytes(c.head, c.index));
    const BlockPtr block = layer.store.evict(layer.grid, c.head, c.index);
    std::memcpy(bytes.data(), block->data(), block->bytes());
    evicted_.push_back(
        {c, mass < 0.0 ? std::numeric_limits<double>::quiet_NaN() : mass, block->format(), std::move(bytes)});
    freed += block->bytes();
  }
  return freed != 0;
}

void Relief::keep() noexcept {
  for (const Evicted& entry : evicted_) {
    const ReliefLayer& layer = layers_[entry.which.layer];
    layer.review.evicted(entry.which.head, entry.which.index, entry.mass);
    layer.scores.evicted(entry.which.head, entry.which.index);
  }
  evicted_.clear();
}

void Relief::take_back() noexcept {
  while (!evicted_.empty()) {
    const Evicted& entry = evicted_.back();
    const Candidate& c = entry.which;
    const ReliefLayer& layer = layers_[c.layer];
    try {
      auto block = std::make_shared<Block>(arena_, entry.format, layer.store.shape().head_dim, kBlockTokens);
      std::memcpy(block->data(), entry.bytes.data(), entry.bytes.size());
      layer.store.put_back(layer.grid, c.head, c.index, std::move(block));
    } catch (const std::exception&) {  // another sequence was given the memory: the block stays evicted
      layer.review.evicted(c.head, c.index, entry.mass);
      layer.scores.evicted(c.head, c.index);
    }
    evicted_.pop_back();
  }
}

std::string Relief::tried() const {
  std::string text = "demoted " + std::to_string(demoted_) + " blocks, no more can be";
  if (eviction_ == Eviction::kNever) return text + "; eviction: never";
  if (guarded_ && overflow_ != Overflow::kEvict) {
    text += "; the guard of 1 % of a head's attention forbids further eviction";
  } else {
    text += "; evicting what may go is not enough";
  }
  return text + "; overflow: " +
         (overflow_ == Overflow::kEvict  ? "evict"
          : overflow_ == Overflow::kStop ? "stop"
                                         : "error");
}

}  // namespace inferos::kv
