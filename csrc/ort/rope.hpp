#pragma once
// Rotary position embedding (https://arxiv.org/abs/2104.09864) with the meaning of ONNX Runtime's GroupQueryAttention.

#include <cstddef>

namespace inferos::ort {

// x[heads][d] in place, for one token. `cosine` and `sine` hold one value per pair, 2 * pairs <= d; channels beyond 2 * pairs stay.
//   halves       (x[i], x[i + pairs])     -> (x[i] * cos[i] - x[i + pairs] * sin[i],  x[i + pairs] * cos[i] + x[i] * sin[i])
//   interleaved  (x[2i], x[2i + 1])       -> the same
void rotate_heads(float* x, std::size_t heads, std::size_t d, const float* cosine, const float* sine, std::size_t pairs,
                  bool interleaved) noexcept;

}  // namespace inferos::ort
