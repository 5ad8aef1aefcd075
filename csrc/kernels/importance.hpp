#pragma once
// The two loops of kv/importance.hpp over the tokens of a block: its average takes a sample in, and a review asks what it is worth.
//
//   fold       average[i] = fp16(average[i] * keep + m * add), m = mass[i] where that is > 0, else 0 (NaN too); in f32, every operation
//              rounded, then to the nearest fp16, saturating
//   heaviest   the products average[i] * norm[i] in f32; the 8 largest of them (all, where there are fewer), added in double in descending order
//
// n is 1..64. Averages and norms are finite and not negative. All ISAs return the same bits.

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/cpu.hpp"

namespace inferos::kernels {

inline constexpr std::size_t kHeaviest = 8;

struct Importance {
  Isa isa;
  void (*fold)(std::uint16_t* average, const float* mass, std::size_t n, float keep, float add) noexcept;
  double (*heaviest)(const std::uint16_t* average, const std::uint16_t* norm, std::size_t n) noexcept;
};

std::span<const Importance> importance_runnable();  // scalar first; only what this CPU can run
const Importance& importance();                     // of active_isa(), and throws as it does

// The 8 largest of `count` values that are not negative, added in descending order. Static, as in block.hpp.
static inline double sum_of_heaviest(const float* values, std::size_t count) noexcept {
  float top[kHeaviest] = {};
  for (std::size_t i = 0; i < count; ++i) {
    const float value = values[i];
    if (!(value > top[kHeaviest - 1])) continue;
    std::size_t place = kHeaviest - 1;
    for (; place > 0 && top[place - 1] < value; --place) top[place] = top[place - 1];
    top[place] = value;
  }
  double sum = 0.0;
  for (const float value : top) sum += static_cast<double>(value);
  return sum;
}

}  // namespace inferos::kernels
