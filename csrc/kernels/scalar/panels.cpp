// Scalar specification of the key panels.

#include "core/fp16.hpp"
#include "kernels/tables.hpp"

namespace inferos::kernels::scalar {
namespace {

constexpr std::size_t kPanelTokens = 16;

void store(const float* rows, std::size_t stride, std::size_t d, std::uint16_t* panel) noexcept {
  for (std::size_t t = 0; t < kPanelTokens; ++t) {
    for (std::size_t c = 0; c < d; ++c) panel[c * kPanelTokens + t] = f32_to_f16_saturate(rows[t * stride + c]);
  }
}

void load(const std::uint16_t* panel, std::size_t d, std::uint16_t* rows) noexcept {
  for (std::size_t t = 0; t < kPanelTokens; ++t) {
    for (std::size_t c = 0; c < d; ++c) rows[t * d + c] = panel[c * kPanelTokens + t];
  }
}

}  // namespace

const Panels kPanels{Isa::kScalar, store, load};

}  // namespace inferos::kernels::scalar
