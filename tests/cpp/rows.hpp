#pragma once
// Random rows for the differential tests: seeded, cheap, and shaped like the data that breaks quantisers.

#include <bit>
#include <cstddef>
#include <cstdint>

#include "core/fp16.hpp"

namespace inferos::tests {

// splitmix64 (https://prng.di.unimi.it/splitmix64.c, public domain): one state word, every seed good.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t bits() {
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15ULL);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }
  std::size_t below(std::size_t n) { return static_cast<std::size_t>((bits() >> 32) * n >> 32); }
  float unit() { return static_cast<float>(bits() >> 40) * 0x1p-24F; }  // 0 <= x < 1
  float around_zero() { return unit() + unit() + unit() - 1.5F; }       // bell-shaped, -1.5 .. 1.5

 private:
  std::uint64_t state_;
};

enum class Shape : std::size_t {
  kBell,       // what activations look like, at any magnitude
  kAnyBits,    // every bit pattern: NaN with payloads, infinities, subnormals
  kLog,        // magnitudes from 1e-44 to 1e38
  kConstant,   // one value, maybe -0
  kOffset,     // a small range far from zero
  kTies,       // small integers: quotients on or next to a tie
  kOutlier,    // x20, x75, x400 beside ordinary values
  kTiny,       // subnormal in f32, or below the smallest fp16
  kSprinkled,  // bell-shaped with NaN, infinity, -0 and 1e38 here and there
};
inline constexpr std::size_t kShapes = 9;

inline float power_of_two(int exponent) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(exponent + 127) << 23);
}

inline float special(Random& random) {
  static constexpr std::uint32_t kBits[] = {0x7FC0'0000U, 0xFFC1'2345U, 0x7F80'0001U, 0x7F80'0000U, 0xFF80'0000U,
                                            0x8000'0000U, 0x7E96'7699U, 0xFE96'7699U, 0x0000'0001U, 0x477F'E001U};
  return std::bit_cast<float>(kBits[random.below(std::size(kBits))]);
}

// Fills n values; the parameters of a shape are drawn once per call.
inline void fill(Random& random, Shape shape, float* x, std::size_t n) {
  const float magnitude = power_of_two(static_cast<int>(random.below(40)) - 28);
  const float base = random.around_zero() * power_of_two(static_cast<int>(random.below(16)));
  for (std::size_t i = 0; i < n; ++i) {
    switch (shape) {
      case Shape::kBell: x[i] = random.around_zero() * magnitude; break;
      case Shape::kAnyBits: x[i] = std::bit_cast<float>(static_cast<std::uint32_t>(random.bits() >> 32)); break;
      case Shape::kLog: {
        const std::uint64_t bits = random.bits();
        x[i] = std::bit_cast<float>(static_cast<std::uint32_t>(bits >> 32 & 0x807F'FFFFU) |
                                    static_cast<std::uint32_t>((bits & 0xFFFFU) * 254 >> 16) << 23);
        break;
      }
      case Shape::kConstant: x[i] = base < 0.1F && base > 0.0F ? -0.0F : base; break;
      case Shape::kOffset: x[i] = base * 64.0F + random.around_zero() * power_of_two(-12); break;
      case Shape::kTies: x[i] = (static_cast<float>(random.below(511)) - 255.0F) * 0.5F; break;
      case Shape::kOutlier: {
        static constexpr float kFactors[] = {1.0F, 1.0F, 1.0F, 20.0F, 75.0F, 400.0F};
        x[i] = random.around_zero() * kFactors[random.below(std::size(kFactors))];
        break;
      }
      case Shape::kTiny: x[i] = random.around_zero() * power_of_two(-126 + static_cast<int>(i % 105)); break;
      case Shape::kSprinkled: x[i] = random.below(12) == 0 ? special(random) : random.around_zero() * magnitude; break;
    }
  }
}

inline void fill(Random& random, Shape shape, std::uint16_t* x, std::size_t n) {
  if (shape == Shape::kAnyBits) {
    for (std::size_t i = 0; i < n; ++i) x[i] = static_cast<std::uint16_t>(random.bits() >> 48);
    return;
  }
  for (std::size_t i = 0; i < n; i += 64) {
    float values[64];
    const std::size_t count = n - i < 64 ? n - i : 64;
    fill(random, shape, values, count);
    for (std::size_t j = 0; j < count; ++j) x[i + j] = f32_to_f16(values[j]);
  }
}

}  // namespace inferos::tests
