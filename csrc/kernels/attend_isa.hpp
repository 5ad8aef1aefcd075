#pragma once
// What attend.cpp finds in each ISA's files, and the few rules all of them share. Functions here are static: an ISA's
// object must hold no symbol that a linker could choose for everyone.

#include <cstddef>
#include <cstdint>
#include <limits>

#include "kernels/attend.hpp"
#include "kernels/block.hpp"

namespace inferos::kernels {

inline constexpr float kSmallestMaximum = 0x1p-100F;  // below it a vector of weights counts as all zero
inline constexpr float kWideLevels = 16256.0F;        // 128 * 127: what hi and lo halves can hold
inline constexpr float kNarrowLevels = 127.0F;
inline constexpr float kWeightLevels = 255.0F;
inline constexpr std::int32_t kNibbleCentre = 8;
inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
inline constexpr float kNotANumber = std::numeric_limits<float>::quiet_NaN();

struct TokenRange {  // tokens [lo, hi) of a block; empty where hi <= lo
  std::size_t lo;
  std::size_t hi;
};

// Widened before subtracting: a caller may say "everything" with the extremes of int32.
static inline TokenRange visible_tokens(std::int32_t start, std::uint16_t begin, std::uint16_t end,
                                        Visible visible) noexcept {
  const std::int64_t first = std::int64_t{visible.first} - start;
  const std::int64_t past = std::int64_t{visible.last} + 1 - start;
  const std::int64_t lo = first > begin ? first : begin;
  const std::int64_t hi = past < end ? past : end;
  if (lo >= hi) return {0, 0};
  return {static_cast<std::size_t>(lo), static_cast<std::size_t>(hi)};
}

// What to fetch while another block is computed: record i of the list, or what comes after the list, or once more the last one.
static inline const std::byte* block_ahead(const DecodeTask& task, std::size_t i, std::size_t record) noexcept {
  if (i < task.count) return task.blocks[i].data;
  if (task.then == nullptr) return task.blocks[task.count - 1].data;
  return task.then + (i - task.count) * record;
}

struct Shown {  // what a DecodeTask gives away of its probabilities, from some head of some block on
  float* logits;
  std::uint16_t* p;
  float* m;
};

static inline Shown shown_from(const DecodeTask& task, std::size_t head) noexcept {
  return {task.logits == nullptr ? nullptr : task.logits + head * kBlockTokens,
          task.seen_p == nullptr ? nullptr : task.seen_p + head * kBlockTokens,
          task.seen_m == nullptr ? nullptr : task.seen_m + head};
}

// Of heads that see nothing of a block.
static inline void show_nothing(const Shown& shown, std::size_t heads) noexcept {
  for (std::size_t i = 0; shown.logits != nullptr && i < heads * kBlockTokens; ++i) shown.logits[i] = kMinusInfinity;
  for (std::size_t i = 0; shown.p != nullptr && i < heads * kBlockTokens; ++i) shown.p[i] = 0;
  for (std::size_t g = 0; shown.m != nullptr && g < heads; ++g) shown.m[g] = kMinusInfinity;
}

#define INFEROS_DECLARE_ATTEND                                                                                       \
  void attend_decode(const DecodeTask& task) noexcept;                                                               \
  void attend_expand(Format format, const BlockView& block, std::size_t d, float* k, float* v) noexcept;             \
  void attend_prefill(const PrefillTile& tile) noexcept;                                                             \
  void attend_mass(const std::uint16_t* p, const float* m, std::size_t group, const float* top, const float* weight, \
                   float* sum) noexcept;                                                                             \
  void attend_exp_below(const float* x, float top, float* out) noexcept

namespace scalar {
INFEROS_DECLARE_ATTEND;
}
namespace avx2 {
INFEROS_DECLARE_ATTEND;
}
namespace avx512vnni {
INFEROS_DECLARE_ATTEND;
}

#undef INFEROS_DECLARE_ATTEND

}  // namespace inferos::kernels
