#include "attention/key_check.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "kernels/codec.hpp"
#include "kernels/scalar/exp.hpp"

namespace inferos::attention {
namespace {

using kernels::BlockView;
using kernels::Format;
using kernels::kBlockTokens;

constexpr std::size_t kBlocks = 4;   // of a head
constexpr std::size_t kQueries = 4;  // of the newest 64
constexpr std::size_t kStride = 16;

struct Sample {
  Format format;
  BlockView view;
};

// Whole blocks with keys wider than INT4, spread over the context; where the spread begins moves on with the length.
std::vector<Sample> sample_blocks(const kv::HeadStreams& streams, std::int32_t length) {
  std::vector<Sample> whole;
  for (const Format format : {Format::kF16, Format::kInt8, Format::kK8V4}) {
    for (const BlockView& view : streams.by_format[static_cast<std::size_t>(format)]) {
      if (view.begin == 0 && view.end == kBlockTokens) whole.push_back({format, view});
    }
  }
  if (whole.size() <= kBlocks) return whole;
  std::vector<Sample> chosen;
  chosen.reserve(kBlocks);
  const std::size_t offset = static_cast<std::size_t>(length) / kBlockTokens % whole.size();
  for (std::size_t i = 0; i < kBlocks; ++i)
    chosen.push_back(whole[(offset + i * whole.size() / kBlocks) % whole.size()]);
  return chosen;
}

// KL divergence of the softmax of `narrow` from that of `held`, n logits each.
double divergence(const float* held, const float* narrow, std::size_t n) noexcept {
  const float top = *std::max_element(held, held + n);
  const float narrow_top = *std::max_element(narrow, narrow + n);
  double total = 0.0;
  double narrow_total = 0.0;
  double moved = 0.0;  // sum of p * (held - narrow), both below their largest
  for (std::size_t i = 0; i < n; ++i) {
    const double p = kernels::scalar::exp_nonpositive(held[i] - top);
    total += p;
    narrow_total += kernels::scalar::exp_nonpositive(narrow[i] - narrow_top);
    moved += p * (static_cast<double>(held[i] - top) - static_cast<double>(narrow[i] - narrow_top));
  }
  return moved / total + std::log(narrow_total) - std::log(total);
}

// The logits of a group on some blocks, [head of the group][block][64].
class Logits {
 public:
  Logits(const Shape& shape, std::size_t blocks)
      : shape_(shape), blocks_(blocks), all_(shape.group * blocks * kBlockTokens), one_(shape.group * kBlockTokens) {}

  void take(const float* q, Format format, const BlockView& view, std::size_t block) {
    std::vector<float>& state = state_;
    state.assign(shape_.group * (shape_.d + 2), 0.0F);
    float* const m = state.data() + shape_.group * shape_.d;
    std::fill_n(m, shape_.group, -std::numeric_limits<float>::infinity());
    kernels::attend().decode({.q = q,
                              .group = shape_.group,
                              .d = shape_.d,
                              .scale = shape_.scale,
                              .softcap = shape_.softcap,
                              .skip_below = std::numeric_limits<float>::infinity(),  // no values
                              .visible = {0, std::numeric_limits<std::int32_t>::max() - 1},
                              .format = format,
                              .blocks = &view,
                              .count = 1,
                              .near = false,
                              .then = nullptr,
                              .o = state.data(),
                              .m = m,
                              .l = m + shape_.group,
                              .logits = one_.data(),
                              .seen_p = nullptr,
                              .seen_m = nullptr});
    for (std::size_t g = 0; g < shape_.group; ++g) {
      std::copy_n(one_.data() + g * kBlockTokens, kBlockTokens, all_.data() + (g * blocks_ + block) * kBlockTokens);
    }
  }
  const float* of(std::size_t g) const noexcept { return all_.data() + g * blocks_ * kBlockTokens; }

 private:
  const Shape& shape_;
  std::size_t blocks_;
  std::vector<float> all_;
  std::vector<float> one_;
  std::vector<float> state_;
};

}  // namespace

std::optional<double> int4_divergence(const RowPlan& row, const Shape& shape) {
  const auto rows = std::make_unique<kernels::BlockRows>();
  const std::size_t record = kernels::block_bytes(Format::kInt4, shape.d);
  std::vector<std::byte> packed(kBlocks * record);
  double sum = 0.0;
  std::size_t measured = 0;
  for (std::size_t head = 0; head < shape.kv_heads; ++head) {
    const std::vector<Sample> sample = sample_blocks(row.streams[head], row.length);
    if (sample.empty()) continue;
    for (std::size_t b = 0; b < sample.size(); ++b) {
      const BlockView& view = sample[b].view;
      kernels::block_to_rows(sample[b].format, view.data, shape.d, view.capacity, kBlockTokens, *rows);
      kernels::rows_to_block(Format::kInt4, *rows, kBlockTokens, shape.d, packed.data() + b * record);
    }
    Logits held(shape, sample.size());
    Logits narrow(shape, sample.size());
    for (std::size_t i = 0; i < kQueries && i * kStride < row.tokens; ++i) {
      const std::size_t token = row.tokens - 1 - i * kStride;
      const float* const q = row.q + (token * shape.heads + head * shape.group) * shape.d;
      for (std::size_t b = 0; b < sample.size(); ++b) {
        const BlockView as_int4{packed.data() + b * record, sample[b].view.start, 0, kBlockTokens, kBlockTokens};
        held.take(q, sample[b].format, sample[b].view, b);
        narrow.take(q, Format::kInt4, as_int4, b);
      }
      for (std::size_t g = 0; g < shape.group; ++g) {
        sum += divergence(held.of(g), narrow.of(g), sample.size() * kBlockTokens);
      }
      measured += shape.group;
    }
  }
  if (measured == 0) return std::nullopt;
  return sum / static_cast<double>(measured);
}

}  // namespace inferos::attention
