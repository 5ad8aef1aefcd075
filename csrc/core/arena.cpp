#include "core/arena.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core/aligned_buffer.hpp"
#include "core/checked.hpp"
#include "core/error.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(address, size) static_cast<void>(0)
#endif

namespace inferos {
namespace {

constexpr std::size_t kAlign = 64;
constexpr std::size_t kMinSlabBytes = std::size_t{64} << 10;
constexpr std::size_t kMaxSlabBytes = kHugePageBytes;
constexpr std::size_t kGrowth =
    16;  // a slab is at most this part of what is reserved: the unused end of one stays small
constexpr std::size_t kBudgetSlabs = 128;  // a budget is cut into about this many
constexpr std::size_t kLastPage = 32;      // the unused end of a slab's last page is at most this part of it
constexpr std::size_t kLookAhead = 8;      // slabs compared to find the fullest: emptier ones get the chance to drain

const char* tag_name(ArenaTag tag) noexcept {
  switch (tag) {
    case ArenaTag::kF16: return "F16 block";
    case ArenaTag::kInt8: return "INT8 block";
    case ArenaTag::kK8V4: return "K8V4 block";
    case ArenaTag::kInt4: return "INT4 block";
    case ArenaTag::kScore: return "scores";
  }
  return "block";
}

// Pages of one block size. The list of free blocks lives beside the blocks, so a released block is never written to.
struct Slab {
  Slab() = default;
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;
  ~Slab() { ASAN_UNPOISON_MEMORY_REGION(memory.data(), memory.size()); }  // another mapping may get these pages

  std::size_t free() const noexcept { return blocks - live; }

  AlignedBuffer memory;
  std::size_t block_bytes = 0;
  std::size_t blocks = 0;  // that fit
  std::size_t carved = 0;  // handed out at least once: untouched pages behind them cost no memory yet
  std::size_t live = 0;
  std::vector<std::uint32_t> freed;  // capacity for all blocks, so that release cannot fail
};

struct SizeClass {
  std::vector<Slab*> open;  // slabs with live blocks and room for more
  Slab* empty = nullptr;    // the one empty slab that is kept, so that a block at a boundary does not map and unmap
  std::size_t slabs = 0;
};

}  // namespace

struct Arena::State {
  mutable std::mutex mutex;
  ArenaStats stats{};
  std::atomic<std::size_t> budget{0};  // changes under the mutex; read without it
  bool huge_pages = true;
  std::size_t fail_countdown = 0;
  std::map<std::size_t, SizeClass> classes;  // by block bytes
  std::vector<std::unique_ptr<Slab>> slabs;  // ascending in address

  std::vector<std::unique_ptr<Slab>>::iterator slab_after(const std::byte* address) {
    return std::upper_bound(slabs.begin(), slabs.end(), address,
                            [](const std::byte* a, const std::unique_ptr<Slab>& slab) {
                              return std::less<>{}(a, static_cast<const std::byte*>(slab->memory.data()));
                            });
  }

  void drop(SizeClass& size_class, Slab* slab) noexcept {
    stats.reserved_bytes -= slab->memory.size();
    stats.slabs -= 1;
    stats.huge_slabs -= slab->memory.huge() ? 1 : 0;
    size_class.slabs -= 1;
    slabs.erase(slab_after(slab->memory.data()) - 1);
  }

  void drop_empty_slabs() noexcept {
    for (auto& [bytes, size_class] : classes) {
      if (size_class.empty != nullptr) drop(size_class, std::exchange(size_class.empty, nullptr));
    }
  }

  std::size_t room() const noexcept { return budget == 0 ? SIZE_MAX : budget - stats.reserved_bytes; }

  // Bytes of a slab for blocks of `bytes` that the budget allows at most: small ones, which empty soon, but not so small that
  // their last pages add up.
  std::size_t largest(std::size_t bytes) const noexcept {
    const std::size_t page = page_bytes();
    std::size_t least = bytes;
    while ((page - least % page) % page * kLastPage > least) least += bytes;
    return std::clamp(std::bit_floor(budget / kBudgetSlabs), least, std::max(least, kMaxSlabBytes));
  }

  // Bytes of the next slab for blocks of `bytes`: as large as the arena's size justifies, less where the budget is nearly used.
  // 0 = not even one block fits.
  std::size_t slab_bytes(std::size_t bytes) const noexcept {
    const std::size_t page = page_bytes();
    std::size_t wanted = std::clamp(std::bit_floor(stats.reserved_bytes / kGrowth), kMinSlabBytes, kMaxSlabBytes);
    if (budget != 0) wanted = std::min(wanted, largest(bytes));
    const std::size_t one = (bytes + page - 1) / page * page;
    if (one > room()) return 0;
    const std::size_t size = std::min(wanted, room() / page * page);
    if (size <= one) return one;
    if (size == kMaxSlabBytes) return size;  // a multiple of 2 MiB, for huge pages
    return (size / bytes * bytes + page - 1) / page * page;
  }

  Slab* add_slab(SizeClass& size_class, std::size_t bytes, ArenaTag tag) {
    std::size_t size = slab_bytes(bytes);
    if (size == 0) {
      drop_empty_slabs();
      size = slab_bytes(bytes);
    }
    if (size == 0) throw Error(ErrorCode::kBudget, refusal(bytes, tag));
    auto slab = std::make_unique<Slab>();
    slab->block_bytes = bytes;
    slab->blocks = size / bytes;
    slab->freed.reserve(slab->blocks);
    size_class.open.reserve(size_class.slabs + 1);  // room for every slab of the class: release never grows it
    slabs.reserve(slabs.size() + 1);
    slab->memory = AlignedBuffer::map(size, huge_pages);
    if (slab->memory.data() == nullptr) {
      throw Error(ErrorCode::kBudget, "arena: the operating system refused " + std::to_string(size) +
                                          " bytes for a slab of " + std::string(tag_name(tag)) + "s; " +
                                          std::to_string(stats.reserved_bytes) + " bytes are reserved");
    }
    ASAN_POISON_MEMORY_REGION(slab->memory.data(), slab->memory.size());
    Slab* added = slab.get();
    slabs.insert(slab_after(added->memory.data()), std::move(slab));
    size_class.slabs += 1;
    stats.reserved_bytes += added->memory.size();
    stats.reserved_high_water_bytes = std::max(stats.reserved_high_water_bytes, stats.reserved_bytes);
    stats.slabs += 1;
    stats.huge_slabs += added->memory.huge() ? 1 : 0;
    return added;
  }

  // The fullest of the first few slabs with room, else the empty one, else a new one. Returns it listed in `open`.
  Slab* slab_with_room(SizeClass& size_class, std::size_t bytes, ArenaTag tag) {
    if (size_class.open.empty()) {
      Slab* slab =
          size_class.empty != nullptr ? std::exchange(size_class.empty, nullptr) : add_slab(size_class, bytes, tag);
      size_class.open.push_back(slab);
      return slab;
    }
    const std::size_t count = std::min(size_class.open.size(), kLookAhead);
    return *std::max_element(size_class.open.end() - static_cast<std::ptrdiff_t>(count), size_class.open.end(),
                             [](const Slab* a, const Slab* b) { return a->live < b->live; });
  }

  static std::byte* take(Slab& slab) noexcept {
    std::size_t index = 0;
    if (slab.freed.empty()) {
      index = slab.carved++;
    } else {
      index = slab.freed.back();
      slab.freed.pop_back();
    }
    slab.live += 1;
    std::byte* const block = slab.memory.data() + index * slab.block_bytes;
    ASAN_UNPOISON_MEMORY_REGION(block, slab.block_bytes);
    return block;
  }

  // Slabs of one size that hold blocks, emptiest first.
  std::vector<Slab*> held(std::size_t bytes) const {
    std::vector<Slab*> found;
    for (const auto& slab : slabs) {
      if (slab->block_bytes == bytes && slab->live != 0) found.push_back(slab.get());
    }
    std::sort(found.begin(), found.end(), [](const Slab* a, const Slab* b) {
      return a->live * b->blocks < b->live * a->blocks;  // by the part that is used
    });
    return found;
  }

  std::string refusal(std::size_t bytes, ArenaTag tag) const {
    return "arena: " + std::to_string(bytes) + " bytes for one " + tag_name(tag) +
           " do not fit: " + std::to_string(stats.reserved_bytes) + " bytes are reserved, " +
           std::to_string(stats.used_bytes) + " of them in use, the budget is " + std::to_string(budget) + " bytes";
  }
};

Arena::Arena(std::size_t budget_bytes, bool huge_pages) : state_(std::make_unique<State>()) {
  if (budget_bytes != 0 && budget_bytes < kMinSlabBytes) {
    throw Error(ErrorCode::kConfig, "Arena: budget_bytes " + std::to_string(budget_bytes) +
                                        " is neither 0 (no limit) nor at least " + std::to_string(kMinSlabBytes));
  }
  state_->budget = budget_bytes;
  state_->huge_pages = huge_pages;
}

Arena::~Arena() = default;

std::byte* Arena::allocate(std::size_t bytes, ArenaTag tag) {
  const std::size_t size = checked_add(std::max<std::size_t>(bytes, 1), kAlign - 1) / kAlign * kAlign;
  State& state = *state_;
  const std::scoped_lock lock(state.mutex);
  if (state.fail_countdown != 0) {
    state.fail_countdown -= 1;
    if (state.fail_countdown == 0) {
      throw Error(ErrorCode::kBudget, state.refusal(size, tag) + " (refused by fail_after)");
    }
  }
  SizeClass& size_class = state.classes[size];
  Slab* slab = state.slab_with_room(size_class, size, tag);
  std::byte* const block = State::take(*slab);
  if (slab->free() == 0) std::erase(size_class.open, slab);

  ArenaStats& stats = state.stats;
  stats.used_bytes += size;
  stats.used_high_water_bytes = std::max(stats.used_high_water_bytes, stats.used_bytes);
  stats.used_by_tag[static_cast<std::size_t>(tag)] += size;
  stats.live_blocks += 1;
  return block;
}

void Arena::release(std::byte* block, std::size_t bytes, ArenaTag tag) noexcept {
  if (block == nullptr) return;
  const std::size_t size = (std::max<std::size_t>(bytes, 1) + kAlign - 1) / kAlign * kAlign;
  State& state = *state_;
  const std::scoped_lock lock(state.mutex);
  Slab* slab = (state.slab_after(block) - 1)->get();
  SizeClass& size_class = state.classes.find(size)->second;
  ASAN_POISON_MEMORY_REGION(block, size);
  slab->freed.push_back(static_cast<std::uint32_t>(static_cast<std::size_t>(block - slab->memory.data()) / size));
  if (slab->live == slab->blocks) size_class.open.push_back(slab);
  slab->live -= 1;

  ArenaStats& stats = state.stats;
  stats.used_bytes -= size;
  stats.used_by_tag[static_cast<std::size_t>(tag)] -= size;
  stats.live_blocks -= 1;
  if (slab->live != 0) return;
  std::erase(size_class.open, slab);
  if (size_class.empty == nullptr) {
    size_class.empty = slab;
    return;
  }
  state.drop(size_class, slab);
}

std::size_t Arena::budget() const noexcept { return state_->budget; }

std::size_t Arena::set_budget(std::size_t budget_bytes) {
  State& state = *state_;
  const std::scoped_lock lock(state.mutex);
  if (budget_bytes != 0) {
    state.drop_empty_slabs();
    budget_bytes = std::max({budget_bytes, kMinSlabBytes, state.stats.reserved_bytes});
  }
  state.budget = budget_bytes;
  return budget_bytes;
}

std::size_t Arena::largest_slab(std::size_t bytes) const noexcept { return state_->largest(bytes); }

std::size_t Arena::available() const {
  const std::scoped_lock lock(state_->mutex);
  std::size_t bytes = state_->room();
  if (bytes == SIZE_MAX) return bytes;
  for (const auto& [size, size_class] : state_->classes) {
    if (size_class.empty != nullptr) bytes += size_class.empty->memory.size();
  }
  return bytes;
}

std::vector<std::size_t> Arena::sparse_sizes() const {
  const std::scoped_lock lock(state_->mutex);
  std::vector<std::size_t> sizes;
  for (const auto& [bytes, size_class] : state_->classes) {
    std::size_t elsewhere = 0;  // free blocks
    const std::vector<Slab*> slabs = state_->held(bytes);
    for (const Slab* slab : slabs) elsewhere += slab->free();
    const auto fits = [&](const Slab* slab) { return slab->live <= elsewhere - slab->free(); };
    if (std::any_of(slabs.begin(), slabs.end(), fits)) sizes.push_back(bytes);
  }
  return sizes;
}

std::size_t Arena::compact(std::size_t bytes, std::span<const std::byte* const> blocks,
                           const std::function<void(std::size_t, std::byte*)>& move) {
  const std::size_t size = checked_add(std::max<std::size_t>(bytes, 1), kAlign - 1) / kAlign * kAlign;
  State& state = *state_;
  const std::scoped_lock lock(state.mutex);
  const auto found = state.classes.find(size);
  if (found == state.classes.end()) return 0;
  SizeClass& size_class = found->second;
  std::map<Slab*, std::vector<std::size_t>> movable;
  for (std::size_t i = 0; i < blocks.size(); ++i) movable[(state.slab_after(blocks[i]) - 1)->get()].push_back(i);
  std::vector<Slab*> kept = state.held(size);
  std::vector<Slab*> emptied;
  std::size_t elsewhere = 0;  // free blocks in slabs that stay
  for (const Slab* slab : kept) elsewhere += slab->free();
  std::erase_if(kept, [&](Slab* slab) {
    const auto own = movable.find(slab);
    if (own == movable.end() || own->second.size() != slab->live) return false;
    if (slab->live + slab->free() > elsewhere) return false;
    elsewhere -= slab->live + slab->free();
    emptied.push_back(slab);
    return true;
  });
  // Nothing below can fail. The fullest slabs are filled first.
  for (Slab* slab : emptied) {
    for (const std::size_t i : movable[slab]) {
      while (kept.back()->free() == 0) kept.pop_back();
      Slab& target = *kept.back();
      move(i, State::take(target));
      if (target.free() == 0) std::erase(size_class.open, &target);
    }
    std::erase(size_class.open, slab);
    state.drop(size_class, slab);
  }
  return emptied.size();
}

std::pair<std::size_t, std::size_t> Arena::occupied() const {
  const std::scoped_lock lock(state_->mutex);
  return {state_->stats.reserved_bytes, state_->stats.used_bytes};
}

ArenaStats Arena::stats() const {
  const std::scoped_lock lock(state_->mutex);
  ArenaStats found = state_->stats;
  found.budget_bytes = state_->budget;
  return found;
}

void Arena::fail_after(std::size_t n) noexcept {
  const std::scoped_lock lock(state_->mutex);
  state_->fail_countdown = n;
}

}  // namespace inferos
