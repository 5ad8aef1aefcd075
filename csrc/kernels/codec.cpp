#include "kernels/codec.hpp"

#if defined(INFEROS_X86)
#include <xmmintrin.h>
#endif

#include "kernels/hadamard.hpp"
#include "kernels/panels.hpp"
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
  alignas(64) std::uint16_t panel[kPanel * kMaxHeadDim];
  for (std::size_t first = 0; first < tokens; first += kPanel) {
    panels().load(k + first * d, d, panel);
    convert().f16_to_f32(panel, (tokens - first < kPanel ? tokens - first : kPanel) * d, rows.k + first * d);
  }
  convert().f16_to_f32(at<std::uint16_t>(block, capacity * d * 2), tokens * d, rows.v);
}

// The rotation would spread one NaN over its whole chunk; zero it first, as the quantiser would.
void drop_nan(float* x, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; ++i) x[i] = x[i] == x[i] ? x[i] : 0.0F;
}

// rotated[n] <- v[n] (fp16), whole rows. Every value of a rotated chunk is a sum of all of its values, so the first one tells of a NaN.
void rotate_f16(const std::uint16_t* v, std::size_t n, std::size_t d, float* rotated) noexcept {
  convert().f16_to_f32(v, n, rotated);
  hadamard().rotate(rotated, n / d, d);
  bool good = true;
  for (std::size_t i = 0; i < n; i += hadamard_size(d)) good &= rotated[i] == rotated[i];
  if (good) return;
  convert().f16_to_f32(v, n, rotated);
  drop_nan(rotated, n);
  hadamard().rotate(rotated, n / d, d);
}

}  // namespace

void prefetch([[maybe_unused]] const std::byte* data, [[maybe_unused]] std::size_t bytes) noexcept {
#if defined(INFEROS_X86)
  for (std::size_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(data) + i, _MM_HINT_T1);
#endif
}

void prefetch_rows(const float* x, std::size_t stride, std::size_t d, std::size_t rows) noexcept {
  for (std::size_t i = 0; i < rows; ++i)
    prefetch(reinterpret_cast<const std::byte*>(x + i * stride), d * sizeof(float));
}

void store_f16_tokens(std::byte* block, std::size_t d, std::size_t capacity, std::size_t first, std::size_t count,
                      const float* k, const float* v, std::size_t stride) noexcept {
  const auto to_f16 = convert().f32_to_f16_saturate;
  auto* keys = at<std::uint16_t>(block, 0);
  auto* values = at<std::uint16_t>(block, capacity * d * 2) + first * d;
  for (const std::size_t end = first + count; first < end;) {
    std::size_t run = 1;
    if (first % kPanel == 0 && end - first >= kPanel) {
      run = kPanel;
      panels().store(k, stride, d, keys + first * d);
    } else {
      std::uint16_t halves[kMaxHeadDim];
      to_f16(k, d, halves);
      auto* column = keys + first / kPanel * kPanel * d + first % kPanel;
      for (std::size_t c = 0; c < d; ++c) column[c * kPanel] = halves[c];
    }
    for (std::size_t i = 0; i < run; ++i) to_f16(v + i * stride, d, values + i * d);
    first += run;
    k += run * stride;
    v += run * stride;
    values += run * d;
  }
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

void f16_to_block(Format format, const std::byte* f16, std::size_t d, std::size_t capacity, std::size_t tokens,
                  const std::byte* next, BlockRows& scratch, std::byte* block) noexcept {
  const BlockLayout layout = packed_layout(format, d);
  const QuantizeOf<std::uint16_t>& kernels = quantize().f16;
  const auto* from_k = at<std::uint16_t>(f16, 0);
  const auto* from_v = at<std::uint16_t>(f16, capacity * d * 2);
  auto* v_scales = at<std::uint16_t>(block, layout.v_scales);
  // In quarters, between the parts of the work: all at once would wait for the memory that it is to hide.
  const std::size_t quarter = f16_block_bytes(d, capacity) / 4;
  const auto fetch = [&](std::size_t part) {
    if (next != nullptr) prefetch(next + part * quarter, quarter);
  };
  fetch(0);
  alignas(64) std::uint16_t k[kBlockTokens * kMaxHeadDim];
  for (std::size_t first = 0; first < tokens; first += kPanel) panels().load(from_k + first * d, d, k + first * d);
  fetch(1);
  const auto pack_k = format == Format::kInt4 ? kernels.k4 : kernels.k8;
  pack_k(k, tokens, d, at<std::uint8_t>(block, layout.k_codes), at<std::uint16_t>(block, layout.k_scales));
  fetch(2);
  if (format == Format::kInt8) {
    kernels.v8(from_v, tokens, d, at<std::int8_t>(block, layout.v_codes), v_scales);
    fetch(3);
    return;
  }
  for (std::size_t first = 0; first < tokens; first += kPanel) {  // some rows at a time: they stay in L1
    const std::size_t count = tokens - first < kPanel ? tokens - first : kPanel;
    rotate_f16(from_v + first * d, count * d, d, scratch.v + first * d);
  }
  fetch(3);
  quantize().f32.v4(scratch.v, tokens, d, at<std::uint8_t>(block, layout.v_codes), v_scales);
}

}  // namespace inferos::kernels
