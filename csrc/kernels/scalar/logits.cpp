// Scalar specification of what a sampler asks of a row of logits.

#include <bit>
#include <cmath>

#include "kernels/attend_isa.hpp"
#include "kernels/tables.hpp"

namespace inferos::kernels::scalar {
namespace {

constexpr std::size_t kLanes = 64;

std::size_t chunk_end(std::size_t start, std::size_t n) noexcept {
  return n - start < kLogitsChunk ? n : start + kLogitsChunk;
}

float largest(const float* x, std::size_t n, float* tops) noexcept {
  float top = kMinusInfinity;
  for (std::size_t start = 0; start < n; start += kLogitsChunk) {
    float here = kMinusInfinity;
    for (std::size_t i = start; i < chunk_end(start, n); ++i) {
      if (std::isfinite(x[i]) && x[i] > here) here = x[i];
    }
    here += 0.0F;  // one zero, not two
    *tops++ = here;
    if (here > top) top = here;
  }
  return top;
}

// lane + exp of the distance that is d * c eighths of an octave.
float add_term(float d, float c, float lane) noexcept {
  const float t = std::fma(d, c, kWeighRint);
  const float k = t - kWeighRint;
  const float r = std::fma(d, c, -k);
  const float p = std::fma(std::fma(std::fma(kWeighC3, r, kWeighC2), r, kWeighC1), r, 1.0F);
  const auto bits = std::bit_cast<std::uint32_t>(t);
  return std::fma(p, std::bit_cast<float>(kWeighTable[bits % 8] + (bits << 20)), lane);
}

double weigh(const float* x, std::size_t n, float top, float inverse_temperature, float* sums) noexcept {
  const float c = inverse_temperature * kEighths;
  const float lowest = kWeighLowest / c;
  double total = 0.0;
  for (std::size_t start = 0; start < n; start += kLogitsChunk) {
    float lanes[kLanes] = {};
    for (std::size_t i = start; i < chunk_end(start, n); ++i) {
      const float d = x[i] - top;
      if (std::isfinite(x[i]) && d >= lowest) lanes[i % kLanes] = add_term(d, c, lanes[i % kLanes]);
    }
    for (std::size_t half = kLanes / 2; half != 0; half /= 2) {
      for (std::size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    *sums++ = lanes[0];
    total += static_cast<double>(lanes[0]);
  }
  return total;
}

std::size_t at_least(const float* x, std::size_t n, float threshold, std::int32_t* positions) noexcept {
  std::size_t count = 0;
  for (std::size_t i = 0; i < n; ++i) {
    if (std::isfinite(x[i]) && x[i] >= threshold) positions[count++] = static_cast<std::int32_t>(i);
  }
  return count;
}

}  // namespace

const Logits kLogits{Isa::kScalar, largest, weigh, at_least};

}  // namespace inferos::kernels::scalar
