#pragma once
// What the vector files of logits.hpp share: the walk over chunks. Their kernels see whole chunks and do not look for NaN or
// infinities; where a result shows that there is one, the chunk is taken again from a clean copy. In an anonymous namespace, so that
// no object exports it.

#include <cstddef>
#include <cstdint>

#include "kernels/attend_isa.hpp"
#include "kernels/logits.hpp"

namespace inferos::kernels {
namespace {

struct CleanChunk {
  alignas(64) float values[kLogitsChunk];
};

// The chunk's logits with -inf for what does not count, and behind the end.
[[gnu::noinline, gnu::cold]] void clean_chunk(const float* x, std::size_t n, CleanChunk& to) noexcept {
  for (std::size_t i = 0; i < kLogitsChunk; ++i) to.values[i] = i < n && x[i] - x[i] == 0.0F ? x[i] : kMinusInfinity;
}

template <float (*kLargest)(const float* chunk) noexcept>  // NaN ignored, infinities not
float largest_by_chunks(const float* x, std::size_t n, float* tops) noexcept {
  CleanChunk copy;
  float top = kMinusInfinity;
  for (std::size_t start = 0; start < n; start += kLogitsChunk) {
    float here = -kMinusInfinity;
    if (n - start >= kLogitsChunk) here = kLargest(x + start);
    if (here == -kMinusInfinity) {
      clean_chunk(x + start, n - start, copy);
      here = kLargest(copy.values);
    }
    here += 0.0F;  // one zero, not two
    *tops++ = here;
    top = here > top ? here : top;
  }
  return top;
}

template <float (*kWeigh)(const float* chunk, float top, float inverse_temperature) noexcept>
double weigh_by_chunks(const float* x, std::size_t n, float top, float inverse_temperature, float* sums) noexcept {
  CleanChunk copy;
  double total = 0.0;
  for (std::size_t start = 0; start < n; start += kLogitsChunk) {
    float here = -kMinusInfinity;
    if (n - start >= kLogitsChunk) here = kWeigh(x + start, top, inverse_temperature);
    if (!(here < -kMinusInfinity)) {  // NaN too
      clean_chunk(x + start, n - start, copy);
      here = kWeigh(copy.values, top, inverse_temperature);
    }
    *sums++ = here;
    total += static_cast<double>(here);
  }
  return total;
}

}  // namespace
}  // namespace inferos::kernels
