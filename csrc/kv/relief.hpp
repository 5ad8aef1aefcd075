#pragma once
// What an `auto` cache does when its arena's budget is used up, in this order:
//
//   compact   blocks that left free places behind are moved together, and whole slabs go back
//   demote    the least important block outside the window, of all layers and heads, straight to its layer's narrowest format
//   evict     the least important blocks that are that narrow, while the share of attention that each head loses stays within kGuard
//   overflow  where the policy says so, further blocks in the same order
//
// Importance is a block's rank within its head. Every demotion finds room for the new block before the old one is freed, so nothing
// can be lost; blocks that forks share stay as they are, because giving one up frees no memory. Evictions that do not make room for the
// step are taken back, where they cannot be expected to they are not begun.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "core/arena.hpp"
#include "kv/importance.hpp"
#include "kv/review.hpp"

namespace inferos::kv {

enum class Eviction : std::uint8_t { kNever = 0, kPressure = 1 };
enum class Overflow : std::uint8_t { kError = 0, kStop = 1, kEvict = 2 };

inline constexpr double kGuard = 0.01;  // of a head's attention may be evicted

// One layer of the cache that needs room.
struct ReliefLayer {
  LayerStore& store;
  const Grid& grid;
  LayerScores& scores;
  LayerReview& review;
};

// Moves blocks that left free places behind together and gives whole slabs back; false where there is none to give.
bool compact(Arena& arena, std::span<const ReliefLayer> layers);

class Relief {
 public:
  // `headroom`: bytes that demotion needs to be available, two slabs. `need`: bytes that the step asks for.
  Relief(Arena& arena, std::vector<ReliefLayer> layers, std::size_t headroom, Eviction eviction, Overflow overflow,
         std::function<std::size_t()> need);
  ~Relief();  // takes evictions back, unless they were kept
  Relief(const Relief&) = delete;
  Relief& operator=(const Relief&) = delete;

  // Each frees a little more, by compacting and demoting or by evicting; false where nothing is left to do.
  bool narrow();
  bool evict();
  // The step goes ahead.
  void keep() noexcept;
  std::string tried() const;

 private:
  struct Candidate {
    double rank;  // 0..1
    std::size_t layer;
    std::size_t head;
    std::size_t index;
    bool low;      // among the lowest l3 of its head now
    bool verdict;  // and in the last three reviews
  };
  struct Evicted {
    Candidate which;
    double mass;
    Format format;
    std::vector<std::byte> bytes;
  };

  void plan_demotions();
  bool demote_some();
  void plan_evictions();
  bool evict_some();
  void take_back() noexcept;
  std::vector<Candidate> candidates();

  Arena& arena_;
  std::vector<ReliefLayer> layers_;
  std::size_t headroom_;
  Eviction eviction_;
  Overflow overflow_;
  std::function<std::size_t()> need_;
  bool compacted_ = false;
  bool demotions_planned_ = false;
  bool evictions_planned_ = false;
  std::vector<Candidate> demotions_;
  std::size_t next_demotion_ = 0;
  std::size_t demoted_ = 0;
  std::vector<Candidate> evictions_;
  std::size_t next_eviction_ = 0;
  std::vector<Evicted> evicted_;
  bool guarded_ = false;  // the guard has kept a block
};

}  // namespace inferos::kv
