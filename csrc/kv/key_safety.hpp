#pragma once
// Whether a layer's keys bear INT4: what `auto` goes by where its narrowest format is left open.
//
// Real queries over the real cache, with the keys of some blocks in INT8 and in INT4, give what INT4 does to the layer's output (attention/key_check.hpp
// measures it at a prompt, and from time to time after it). A layer whose output is once moved too far keeps its keys in INT8 from then on.
//
// The output and not the probabilities: where a sink takes nearly all of the attention, the rest may change as it likes. And against what the output differs
// by from query to query, not against all of it: what is the same for every query, as a sink's value is, tells the model nothing.
// All of it depends on token indexes only.

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace inferos::kv {

// Sums over queries, heads and channels.
struct KeyError {
  double moved = 0.0;   // squares of what the output changes by
  double whole = 0.0;   // squares of the output
  double spread = 0.0;  // squares of its distance from the mean over the queries
  std::size_t queries = 0;
};

// Of the spread, root mean square. Keys that bear INT4 lie at 0.005 to 0.12; those that do not, at 0.15 and more.
inline constexpr double kSafeError = 0.13;
inline constexpr double kKeyMemory = 0.75;        // what a check leaves of those before it
inline constexpr std::size_t kSpreadQueries = 8;  // fewer do not tell the spread: it is taken from the check before
inline constexpr std::int64_t kKeyCheckInterval = 512;  // tokens between two checks

class LayerKeys {
 public:
  // In a step of `tokens` tokens; during a long prompt more and more seldom, because many queries are looked at there.
  bool is_due(std::int64_t visible, std::int64_t tokens) const noexcept {
    if (state_ == State::kUnsafe || visible == checked_at_) return false;
    if (state_ == State::kUnknown) return true;
    if (tokens > 1 && visible > checked_at_)
      return visible - checked_at_ >= std::max(kKeyCheckInterval, checked_at_ / 4);
    return visible / kKeyCheckInterval != checked_at_ / kKeyCheckInterval;
  }
  void checked(std::int64_t visible, const KeyError& error) noexcept {
    checked_at_ = visible;
    if (error.queries >= kSpreadQueries && error.whole > 0.0) share_ = error.spread / error.whole;
    moved_ = kKeyMemory * moved_ + error.moved;
    spread_ = kKeyMemory * spread_ + (error.queries >= kSpreadQueries ? error.spread : error.whole * share_);
    state_ = moved_ <= kSafeError * kSafeError * spread_ ? State::kSafe : State::kUnsafe;
  }
  void set_back(std::int64_t length) noexcept { checked_at_ = std::min(checked_at_, length); }
  bool is_safe() const noexcept { return state_ == State::kSafe; }

 private:
  enum class State : std::uint8_t { kUnknown, kSafe, kUnsafe };
  State state_ = State::kUnknown;
  std::int64_t checked_at_ = -1;  // visible tokens
  double moved_ = 0.0;
  double spread_ = 0.0;
  double share_ = 1.0;  // of the output that is spread
};

}  // namespace inferos::kv
