#include "kv/registry.hpp"

#include <array>
#include <atomic>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace inferos::kv {
namespace {

// A slot's state word: generation << 2 | barred | busy. Generation 0 is never handed out; a free slot is barred.
// Only the holder of the busy bit touches the cache. close and abandon bar the slot first, then wait for the holder to leave.
constexpr std::uint64_t kBusy = 1;
constexpr std::uint64_t kBarred = 2;
constexpr std::uint64_t kMaxGeneration = 0x7FFFFFFF;

struct Slot {
  std::atomic<std::uint64_t> word{kBarred};
  std::unique_ptr<SequenceCache> cache;
  std::uint64_t opened_as = 1;  // generation when the present sequence was opened; guarded by the registry's mutex
  std::optional<Error> error;   // guarded by the registry's mutex
};

constexpr std::size_t kChunkSlots = 256;
constexpr std::size_t kChunks = 4096;
using Chunk = std::array<Slot, kChunkSlots>;

// Slots stay where they are for the life of the process, so that a lease finds one without a lock.
struct Registry {
  std::mutex mutex;
  std::array<std::atomic<Chunk*>, kChunks> chunks{};
  std::vector<std::unique_ptr<Chunk>> owned;
  std::vector<std::uint32_t> free;
  std::atomic<std::size_t> open{0};

  Slot* find(std::uint32_t index) noexcept {
    if (index >= kChunks * kChunkSlots) return nullptr;
    Chunk* chunk = chunks[index / kChunkSlots].load(std::memory_order_acquire);
    return chunk == nullptr ? nullptr : &(*chunk)[index % kChunkSlots];
  }
};

Registry& registry() {
  static Registry instance;
  return instance;
}

std::uint64_t generation_of(Handle handle) noexcept { return static_cast<std::uint64_t>(handle) >> 32; }
std::uint32_t slot_of(Handle handle) noexcept { return static_cast<std::uint32_t>(static_cast<std::uint64_t>(handle)); }
Handle make_handle(std::uint64_t generation, std::uint32_t slot) noexcept {
  return static_cast<Handle>(generation << 32 | slot);
}

Error closed(Handle handle) {
  return {ErrorCode::kClosed, "sequence handle " + std::to_string(handle) + " is unknown, closed or superseded"};
}

Slot* slot_for(Handle handle) noexcept { return handle <= 0 ? nullptr : registry().find(slot_of(handle)); }

// Bars the handle's slot against new leases and waits for the one in flight. Returns the slot, now the caller's alone.
Slot& bar(Handle handle) {
  Slot* slot = slot_for(handle);
  if (slot == nullptr) throw closed(handle);
  std::uint64_t word = slot->word.load(std::memory_order_relaxed);
  do {
    if (word >> 2 != generation_of(handle) || (word & kBarred) != 0) throw closed(handle);
  } while (!slot->word.compare_exchange_weak(word, word | kBarred, std::memory_order_acquire));
  for (word |= kBarred; (word & kBusy) != 0; word = slot->word.load(std::memory_order_acquire)) {
    slot->word.wait(word, std::memory_order_acquire);
  }
  return *slot;
}

// Adds a chunk's worth of free slots. The caller holds the mutex.
void grow(Registry& r) {
  const std::size_t index = r.owned.size();
  if (index == kChunks)
    throw Error(ErrorCode::kBudget, "open_sequence: " + std::to_string(r.open.load()) + " are open");
  r.free.reserve((index + 1) * kChunkSlots);  // giving a slot back never fails
  r.owned.push_back(std::make_unique<Chunk>());
  for (std::size_t i = kChunkSlots; i > 0; --i)
    r.free.push_back(static_cast<std::uint32_t>(index * kChunkSlots + i - 1));
  r.chunks[index].store(r.owned.back().get(), std::memory_order_release);
}

}  // namespace

Handle open_sequence(std::unique_ptr<SequenceCache> cache) {
  if (cache == nullptr) throw Error(ErrorCode::kConfig, "open_sequence: no cache");
  Registry& r = registry();
  const std::scoped_lock lock(r.mutex);
  if (r.free.empty()) grow(r);
  const std::uint32_t index = r.free.back();
  r.free.pop_back();
  Slot& slot = *r.find(index);
  const std::uint64_t generation = (slot.word.load(std::memory_order_relaxed) >> 2) + 1;
  slot.cache = std::move(cache);
  slot.error.reset();
  slot.opened_as = generation;
  slot.word.store(generation << 2, std::memory_order_release);
  r.open.fetch_add(1, std::memory_order_relaxed);
  return make_handle(generation, index);
}

void close_sequence(Handle handle) {
  Slot& slot = bar(handle);
  const std::unique_ptr<SequenceCache> cache = std::move(slot.cache);  // freed after the slot is given back
  Registry& r = registry();
  const std::scoped_lock lock(r.mutex);
  r.open.fetch_sub(1, std::memory_order_relaxed);
  // A slot whose generations are used up is retired: a handle must never come back.
  if (generation_of(handle) < kMaxGeneration - 1) r.free.push_back(slot_of(handle));
}

Handle abandon(Handle handle) {
  const std::uint64_t generation = generation_of(handle) + 1;
  if (generation >= kMaxGeneration) throw closed(handle);
  Slot& slot = bar(handle);
  slot.cache->rollback();
  slot.word.store(generation << 2, std::memory_order_release);
  return make_handle(generation, slot_of(handle));
}

std::size_t open_sequences() noexcept { return registry().open.load(std::memory_order_relaxed); }

std::optional<Error> take_error(Handle handle) noexcept {
  Slot* slot = slot_for(handle);
  if (slot == nullptr) return std::nullopt;
  const std::scoped_lock lock(registry().mutex);
  if (generation_of(handle) < slot->opened_as) return std::nullopt;
  return std::exchange(slot->error, std::nullopt);
}

void keep_error(Handle handle, const Error& error) noexcept {
  Slot* slot = slot_for(handle);
  if (slot == nullptr) return;
  const std::scoped_lock lock(registry().mutex);
  if (generation_of(handle) < slot->opened_as) return;
  try {
    slot->error = error;
  } catch (const std::bad_alloc&) {
    slot->error.reset();  // no memory for the text: the host still has ONNX Runtime's own
  }
}

Lease::Lease(Handle handle) : slot_(slot_of(handle)), held_(true) {
  Slot* slot = slot_for(handle);
  if (slot == nullptr) throw closed(handle);
  std::uint64_t word = generation_of(handle) << 2;
  if (slot->word.compare_exchange_strong(word, word | kBusy, std::memory_order_acquire, std::memory_order_relaxed))
    return;
  if (word != (generation_of(handle) << 2 | kBusy)) throw closed(handle);
  throw Error(ErrorCode::kBusy, "sequence handle " + std::to_string(handle) + " is in use by another call");
}

Lease::~Lease() {
  if (!held_) return;
  std::atomic<std::uint64_t>& word = registry().find(slot_)->word;
  if ((word.fetch_and(~kBusy, std::memory_order_release) & kBarred) != 0) word.notify_all();
}

Lease::Lease(Lease&& other) noexcept : slot_(other.slot_), held_(std::exchange(other.held_, false)) {}

SequenceCache& Lease::operator*() const noexcept { return *registry().find(slot_)->cache; }
SequenceCache* Lease::operator->() const noexcept { return registry().find(slot_)->cache.get(); }

}  // namespace inferos::kv
