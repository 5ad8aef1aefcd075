#pragma once
// Handles: what a graph input, a C host or Python names a sequence by. An int64 that carries a slot and a generation, never an address.

#include <cstdint>
#include <memory>
#include <optional>

#include "core/error.hpp"
#include "kv/sequence_cache.hpp"

namespace inferos::kv {

using Handle = std::int64_t;  // > 0

// Process-wide. Opening and closing take a mutex; holding a sequence is one compare-and-swap on its slot's state word
// (generation and a busy bit), so nothing is locked on the decode path.
Handle open_sequence(std::unique_ptr<SequenceCache> cache);
// Waits for the lease in flight to end, then frees the sequence; so does abandon: never call them under a lease of your own on it.
// Error{kClosed} where the handle is not current.
void close_sequence(Handle handle);
// After a hang: waits for a layer call in flight inside our code, drops the open step and returns the sequence's new handle.
// The old one is refused from now on, so a run that finishes late cannot write.
Handle abandon(Handle handle);
std::size_t open_sequences() noexcept;

// The typed error of the last failed call through this handle's slot, kept because ONNX Runtime flattens it to a string; taking clears it.
// Valid for stale handles too, as long as the slot is not reused.
std::optional<Error> take_error(Handle handle) noexcept;
void keep_error(Handle handle, const Error& error) noexcept;

// Exclusive use of one sequence. Throws Error{kClosed} or Error{kBusy} (another thread holds it), naming the handle.
class Lease {
 public:
  explicit Lease(Handle handle);
  ~Lease();
  Lease(Lease&& other) noexcept;
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  Lease& operator=(Lease&&) = delete;
  SequenceCache& operator*() const noexcept;
  SequenceCache* operator->() const noexcept;

 private:
  std::uint32_t slot_;
  bool held_;
};

}  // namespace inferos::kv
