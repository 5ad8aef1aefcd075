#include "attention/key_check.hpp"

#include <algorithm>
#include <memory>
#include <numeric>
#include <span>
#include <vector>

#include "kernels/codec.hpp"

namespace inferos::attention {
namespace {

using kernels::BlockView;
using kernels::Format;
using kernels::kBlockTokens;

constexpr std::size_t kBlocks = 8;    // of a head
constexpr std::size_t kQueries = 16;  // of the newest 64
constexpr std::size_t kStride = 4;

struct Sample {
  Format format;
  BlockView view;
  double mass;  // averaged share of the head's attention
};

// Whole blocks of a head with keys wider than INT4: those that have left the window, or where there is none those within it.
std::vector<Sample> candidates(const RowPlan& row, std::size_t head) {
  const auto window = static_cast<std::int32_t>(row.scored->options().recent_window);
  std::vector<Sample> outside;
  std::vector<Sample> within;
  for (const Format format : {Format::kF16, Format::kInt8, Format::kK8V4}) {
    for (const BlockView& view : row.streams[head].by_format[static_cast<std::size_t>(format)]) {
      if (view.begin != 0 || view.end != kBlockTokens) continue;
      const bool left = view.start + static_cast<std::int32_t>(kBlockTokens) <= row.length - window;
      const double mass = row.scored->mass_at(row.layer, head, view.start);
      if (mass >= 0.0) (left ? outside : within).push_back({format, view, mass});
    }
  }
  return outside.empty() ? within : outside;
}

double squares(std::span<const Sample> blocks) noexcept {
  double sum = 0.0;
  for (const Sample& block : blocks) sum += block.mass * block.mass;
  return sum;
}

// The heaviest few of them; returns how many times what they do all of them may do. A block moves the output by its mass, and blocks do so independently.
double choose(std::vector<Sample>& blocks) {
  const double all = squares(blocks);
  const std::size_t kept = std::min(kBlocks, blocks.size());
  std::partial_sort(blocks.begin(), blocks.begin() + static_cast<std::ptrdiff_t>(kept), blocks.end(),
                    [](const Sample& a, const Sample& b) {
                      return a.mass > b.mass || (a.mass == b.mass && a.view.start < b.view.start);
                    });
  blocks.resize(kept);
  const double own = squares(blocks);
  return blocks.empty() ? 0.0 : own > 0.0 ? all / own : 1.0;
}

// The streams of a head with its sample in another format.
kv::HeadStreams with_sample(const kv::HeadStreams& streams, std::span<const Sample> sample, Format format,
                            const std::byte* records, std::size_t record) {
  kv::HeadStreams changed = streams;
  auto& to = changed.by_format[static_cast<std::size_t>(format)];
  for (const Sample& block : sample) {
    std::erase_if(changed.by_format[static_cast<std::size_t>(block.format)],
                  [&](const BlockView& view) { return view.start == block.view.start; });
    to.push_back({records, block.view.start, 0, kBlockTokens, kBlockTokens});
    records += record;
  }
  std::sort(to.begin(), to.end(), [](const BlockView& a, const BlockView& b) { return a.start < b.start; });
  return changed;
}

// What is attended to, with the samples of all heads in one format.
struct Version {
  Version(Format kept, const Shape& shape)
      : format(kept),
        record(kernels::block_bytes(kept, shape.d)),
        records(shape.kv_heads * kBlocks * record),
        out(shape.heads * shape.d) {}

  void add(const kv::HeadStreams& held, std::span<const Sample> sample, std::size_t d, kernels::BlockRows& rows) {
    std::byte* const own = records.data() + streams.size() * kBlocks * record;
    for (std::size_t b = 0; b < sample.size(); ++b) {
      kernels::block_to_rows(sample[b].format, sample[b].view.data, d, sample[b].view.capacity, kBlockTokens, rows);
      kernels::rows_to_block(format, rows, kBlockTokens, d, own + b * record);
    }
    streams.push_back(with_sample(held, sample, format, own, record));
  }

  void attend(const RowPlan& row, std::size_t token, const Shape& shape, Executor& executor) {
    const RowPlan one{nullptr, streams,  row.q + token * shape.heads * shape.d, out.data(), 1, row.position(token) + 1,
                      nullptr, row.layer};
    decode_rows({&one, 1}, shape, executor);
  }

  Format format;
  std::size_t record;
  std::vector<std::byte> records;  // [kv_head][kBlocks]
  std::vector<kv::HeadStreams> streams;
  std::vector<float> out;  // [head][d]
};

}  // namespace

std::optional<kv::KeyError> int4_error(const RowPlan& row, const Shape& shape, Executor& executor) {
  const auto rows = std::make_unique<kernels::BlockRows>();
  Version wide(Format::kK8V4, shape);
  Version narrow(Format::kInt4, shape);
  std::vector<double> weights;  // by kv head
  for (std::size_t head = 0; head < shape.kv_heads; ++head) {
    std::vector<Sample> sample = candidates(row, head);
    weights.push_back(choose(sample));
    wide.add(row.streams[head], sample, shape.d, *rows);
    narrow.add(row.streams[head], sample, shape.d, *rows);
  }
  if (std::all_of(weights.begin(), weights.end(), [](double weight) { return weight == 0.0; })) return std::nullopt;
  kv::KeyError found{};
  std::vector<double> mean(wide.out.size());
  for (std::size_t i = 0; i < kQueries && i * kStride < row.tokens; ++i) {
    const std::size_t token = row.tokens - 1 - i * kStride;
    wide.attend(row, token, shape, executor);
    narrow.attend(row, token, shape, executor);
    for (std::size_t c = 0; c < wide.out.size(); ++c) {
      const double weight = weights[c / shape.d / shape.group];
      if (weight == 0.0) continue;
      const double whole = wide.out[c];
      const double moved = static_cast<double>(narrow.out[c]) - whole;
      found.moved += weight * moved * moved;
      found.whole += whole * whole;
      mean[c] += whole;
    }
    found.queries += 1;
  }
  const auto queries = static_cast<double>(found.queries);
  const double common = std::inner_product(mean.begin(), mean.end(), mean.begin(), 0.0) / queries;
  found.spread = std::max(found.whole - common, 0.0) * queries / std::max(queries - 1.0, 1.0);
  return found;
}

}  // namespace inferos::attention
