#include "kernels/codec.hpp"

#include "kernels/hadamard.hpp"
#include "kernels/quantize.hpp"

namespace inferos::kernels {
namespace {

constexpr std::size_t kPanel = 16;  // tokens side by side in a F16 block's K

template <class T>
T* at(std::byte* block, std::size_t offset) noexcept {
  return reinterpret_cast<T*>(block + offset);
}
template <class T>
const T* at(const std::byte* block, std::size_t offset) noexcept {
  return reinterpret_cast<const T*>(block + offset);
}

void f16_to_rows(const std::byte* block, std::size_t d, std::size_t capacity, std::size_t tokens,
                 BlockRows& rows) noexcept {
  const auto* k = at<std::uint16_t>(block, 0);
  const auto* v = at<std::uint16_t>(block, capacity * d * 2);
  const Convert& kernels = convert();
  alignas(64) float panel[kPanel * kMaxHeadDim];
  for (std::size_t first = 0; first < tokens; first += kPanel) {
    const std::size_t count = tokens - first < kPanel ? tokens - first : kPanel;
    kernels.f16_to_f32(k + first * d, kPanel * d, panel);
    for (std::size_t t = 0; t < count; ++t) {
      for (std::size_t c = 0; c < d; ++c) rows.k[(first + t) * d + c] = panel[c * kPanel + t];
    }
  }
  kernels.f16_to_f32(v, tokens * d, rows.v);
}

// The rotation would spread one NaN over its whole chunk; zero it first, as the quantiser would.
void drop_nan(float* x, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; ++i) x[i] = x[i] == x[i] ? x[i] : 0.0F;
}

}  // namespace

void store_f16_token(std::byte* block, std::size_t d, std::size_t capacity, std::size_t token, const float* k,
                     const float* v) noexcept {
  const Convert& kernels = convert();
  std::uint16_t halves[kMaxHeadDim];
  kernels.f32_to_f16_saturate(k, d, halves);
  auto* column = at<std::uint16_t>(block, 0) + token / kPanel * kPanel * d + token % kPanel;
  for (std::size_t c = 0; c < d; ++c) column[c * kPanel] = halves[c];
  kernels.f32_to_f16_saturate(v, d, at<std::uint16_t>(block, capacity * d * 2) + token * d);
}

void block_to_rows(Format format, const std::byte* block, std::size_t d, std::size_t capacity, std::size_t tokens,
                   BlockRows& rows) noexcept {
  if (format == Format::kF16) {
    f16_to_rows(block, d, capacity, tokens, rows);
    return;
  }
  const BlockLayout layout = packed_layout(format, d);
  const QuantizeOf<float>& kernels = quantize().f32;
  const auto* k_scales = at<std::uint16_t>(block, layout.k_scales);
  const auto* v_scales = at<std::uint16_t>(block, layout.v_scales);
  const auto un_k = format == Format::kInt4 ? kernels.un_k4 : kernels.un_k8;
  un_k(at<std::uint8_t>(block, layout.k_codes), k_scales, d, rows.k);
  if (format == Format::kInt8) {
    kernels.un_v8(at<std::int8_t>(block, layout.v_codes), v_scales, d, rows.v);
  } else {
    kernels.un_v4(at<std::uint8_t>(block, layout.v_codes), v_scales, d, rows.v);
    hadamard().rotate(rows.v, tokens, d);
  }
}

void rows_to_block(Format format, BlockRows& rows, std::size_t tokens, std::size_t d, std::byte* block) noexcept {
  const BlockLayout layout = packed_layout(format, d);
  const QuantizeOf<float>& kernels = quantize().f32;
  auto* k_scales = at<std::uint16_t>(block, layout.k_scales);
  auto* v_scales = at<std::uint16_t>(block, layout.v_scales);
  const auto pack_k = format == Format::kInt4 ? kernels.k4 : kernels.k8;
  pack_k(rows.k, tokens, d, at<std::uint8_t>(block, layout.k_codes), k_scales);
  if (format == Format::kInt8) {
    kernels.v8(rows.v, tokens, d, at<std::int8_t>(block, layout.v_codes), v_scales);
  } else {
    drop_nan(rows.v, tokens * d);
    hadamard().rotate(rows.v, tokens, d);
    kernels.v4(rows.v, tokens, d, at<std::uint8_t>(block, layout.v_codes), v_scales);
  }
}

}  // namespace inferos::kernels
