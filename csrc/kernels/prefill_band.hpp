#pragma once
// What the prefill kernels of AVX2 and AVX-512 share: the rows of a tile that go through its two products together.

#include <cstddef>
#include <cstdint>

#include "kernels/attend_isa.hpp"

// Loops over registers are unrolled by force: else g++ 12 keeps their arrays in memory around the loop that uses them.
#if defined(__GNUC__) && !defined(__clang__)
#define INFEROS_UNROLL _Pragma("GCC unroll 8")
#else
#define INFEROS_UNROLL
#endif

namespace inferos::kernels {
namespace {  // each ISA's file compiles its own

constexpr std::size_t kT = kBlockTokens;
constexpr std::size_t kRows = 6;           // of a register block
constexpr std::size_t kBand = 16 * kRows;  // rows whose logits are kept: 24 KiB

// Rows of the tile from `first` on, and what each sees of it: every one `all` of its tokens, or its own range.
struct Band {
  const PrefillTile& tile;
  std::size_t first;
  std::size_t rows;
  bool whole;
  TokenRange all;
  TokenRange range[kBand];  // unless whole
  alignas(64) float alpha[kBand];
  alignas(64) float s[kBand][kT];  // logits, then probabilities

  Band(const PrefillTile& of, std::size_t begin, std::size_t count) noexcept : tile(of), first(begin), rows(count) {
    all = {of.begin, of.end};
    const std::int32_t from = of.start + of.begin;
    const std::int32_t to = of.start + of.end - 1;
    whole = of.begin < of.end;
    for (std::size_t r = 0; r < rows; ++r)
      whole &= of.visible[first + r].first <= from && of.visible[first + r].last >= to;
    if (whole) return;
    for (std::size_t r = 0; r < rows; ++r) range[r] = visible_tokens(of.start, of.begin, of.end, of.visible[first + r]);
  }

  TokenRange seen(std::size_t row) const noexcept { return whole ? all : range[row]; }

  // Tokens that rows `row`.. of a register block see, from the first to the last of any.
  TokenRange seen_by(std::size_t row, std::size_t count) const noexcept {
    if (whole) return all;
    TokenRange any{kT, 0};
    for (std::size_t r = row; r < row + count; ++r) {
      if (range[r].lo >= range[r].hi) continue;
      any.lo = range[r].lo < any.lo ? range[r].lo : any.lo;
      any.hi = range[r].hi > any.hi ? range[r].hi : any.hi;
    }
    return any;
  }
};

}  // namespace
}  // namespace inferos::kernels
