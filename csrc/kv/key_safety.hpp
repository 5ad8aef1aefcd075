#pragma once
// Whether a layer's keys bear INT4: what `auto` goes by where its narrowest format is left open.
//
// Real queries against real blocks of keys, each block as it is held and as INT4 would hold it, give what INT4 does to the softmax
// (attention/key_check.hpp measures it at a prompt, and from time to time after it). A layer that is once moved too far keeps its keys in INT8 from
// then on. All of it depends on token indexes only.

#include <algorithm>
#include <cstdint>

namespace inferos::kv {

// Nats. Keys that bear INT4 lie at 0.004 to 0.02; those that do not, at 0.15 and more.
inline constexpr double kSafeDivergence = 0.05;
inline constexpr std::int64_t kKeyCheckInterval = 512;  // tokens between two checks

class LayerKeys {
 public:
  bool is_due(std::int64_t visible) const noexcept {
    if (state_ == State::kUnsafe || visible == checked_at_) return false;
    return state_ == State::kUnknown || visible / kKeyCheckInterval != checked_at_ / kKeyCheckInterval;
  }
  void checked(std::int64_t visible, double divergence) noexcept {
    checked_at_ = visible;
    state_ = divergence <= kSafeDivergence ? State::kSafe : State::kUnsafe;
  }
  void set_back(std::int64_t length) noexcept { checked_at_ = std::min(checked_at_, length); }
  bool is_safe() const noexcept { return state_ == State::kSafe; }

 private:
  enum class State : std::uint8_t { kUnknown, kSafe, kUnsafe };
  State state_ = State::kUnknown;
  std::int64_t checked_at_ = -1;  // visible tokens
};

}  // namespace inferos::kv
