#pragma once
// Whether a layer's keys bear INT4: what `auto` goes by where its narrowest format is left open.
//
// Real queries over the real cache, with the keys of some blocks in INT8 and in INT4, give what INT4 does to the layer's output (attention/key_check.hpp
// measures it at a prompt, and from time to time after it). A layer whose output is once moved too far keeps its keys in INT8 from then on. The output and not the
// probabilities: where a sink takes nearly all of the attention, the rest may change as it likes. All of it depends on token indexes only.

#include <algorithm>
#include <cstdint>

namespace inferos::kv {

// Sums over queries, heads and channels.
struct KeyError {
  double moved = 0.0;  // squares of what the output changes by
  double whole = 0.0;  // squares of the output
};

// Of the output, root mean square. Keys that bear INT4 lie at 0.002 to 0.03; those that do not, at 0.14 and more.
inline constexpr double kSafeError = 0.1;
inline constexpr double kKeyMemory = 0.75;              // what a check leaves of those before it
inline constexpr std::int64_t kKeyCheckInterval = 512;  // tokens between two checks

class LayerKeys {
 public:
  bool is_due(std::int64_t visible) const noexcept {
    if (state_ == State::kUnsafe || visible == checked_at_) return false;
    return state_ == State::kUnknown || visible / kKeyCheckInterval != checked_at_ / kKeyCheckInterval;
  }
  void checked(std::int64_t visible, const KeyError& error) noexcept {
    checked_at_ = visible;
    sum_.moved = kKeyMemory * sum_.moved + error.moved;
    sum_.whole = kKeyMemory * sum_.whole + error.whole;
    state_ = sum_.moved <= kSafeError * kSafeError * sum_.whole ? State::kSafe : State::kUnsafe;
  }
  void set_back(std::int64_t length) noexcept { checked_at_ = std::min(checked_at_, length); }
  bool is_safe() const noexcept { return state_ == State::kSafe; }

 private:
  enum class State : std::uint8_t { kUnknown, kSafe, kUnsafe };
  State state_ = State::kUnknown;
  std::int64_t checked_at_ = -1;  // visible tokens
  KeyError sum_;
};

}  // namespace inferos::kv
