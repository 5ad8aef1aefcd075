#include "ort/rope.hpp"

namespace inferos::ort {

void rotate_heads(float* x, std::size_t heads, std::size_t d, const float* cosine, const float* sine, std::size_t pairs,
                  bool interleaved) noexcept {
  const std::size_t step = interleaved ? 2 : 1;
  const std::size_t distance = interleaved ? 1 : pairs;
  for (std::size_t h = 0; h < heads; ++h) {
    float* head = x + h * d;
    for (std::size_t i = 0; i < pairs; ++i) {
      const float a = head[i * step];
      const float b = head[i * step + distance];
      head[i * step] = a * cosine[i] - b * sine[i];
      head[i * step + distance] = b * cosine[i] + a * sine[i];
    }
  }
}

}  // namespace inferos::ort
