#pragma once
// What decode.cpp and prefill.cpp share: one row of the batch, ready to compute.

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "attention/attention.hpp"
#include "core/executor.hpp"
#include "kernels/attend.hpp"
#include "kv/sequence_cache.hpp"

namespace inferos::attention {

// Rotated formats come first, so that o is rotated back once, before the others add to it.
inline constexpr std::array kVisitOrder{kernels::Format::kK8V4, kernels::Format::kInt4, kernels::Format::kInt8,
                                        kernels::Format::kF16};

struct Shape {
  std::size_t heads;
  std::size_t kv_heads;
  std::size_t group;  // query heads per kv head
  std::size_t d;
  float scale;
  float softcap;
  std::int32_t local_window;
};

struct RowPlan {
  kv::SequenceCache* scored;                 // who takes the attention mass, or nullptr
  std::span<const kv::HeadStreams> streams;  // by kv head
  const float* q;                            // [tokens][heads][d]
  float* out;                                // [tokens][heads][d]
  std::size_t tokens;
  std::int32_t length;  // visible positions: the newest is length - 1
  float* mass;          // nullptr, or [kv_heads][length]
  std::size_t layer;

  bool wants_mass() const noexcept { return mass != nullptr || scored != nullptr; }
  std::int32_t position(std::size_t token) const noexcept { return length - static_cast<std::int32_t>(tokens - token); }
};

inline kernels::Visible visible_at(std::int32_t position, std::int32_t local_window) noexcept {
  const bool all = local_window < 0 || local_window > position;
  return {all ? 0 : position - local_window, position};
}

// The part of an ascending list that holds a token within the range.
std::span<const kernels::BlockView> blocks_within(std::span<const kernels::BlockView> blocks,
                                                  kernels::Visible range) noexcept;

// One query head's result from its sums: o / l, zeros where it saw nothing, NaN where q is not finite.
void finish_head(const float* q, float* o, float l, std::size_t d) noexcept;

// Room for floats from a 64-byte boundary on: vector loads that cross cache lines take twice as long. Grows, never shrinks.
class Floats {
 public:
  float* at_least(std::size_t n) {
    constexpr std::size_t kLine = 64 / sizeof(float);
    if (values_.size() < n + kLine) values_.resize(n + kLine);
    const std::size_t past = reinterpret_cast<std::uintptr_t>(values_.data()) / sizeof(float) % kLine;
    return values_.data() + (past == 0 ? 0 : kLine - past);
  }

 private:
  std::vector<float> values_;
};

// Every row has one token.
void decode_rows(std::span<const RowPlan> rows, const Shape& shape, Executor& executor);
void prefill_rows(std::span<const RowPlan> rows, const Shape& shape, Executor& executor);
// Mean probability over a sample of the newest queries of each row that asks for it.
void add_prefill_mass(std::span<const RowPlan> rows, const Shape& shape, Executor& executor);

}  // namespace inferos::attention
