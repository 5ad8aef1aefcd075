#include "attention/key_check.hpp"

#include <algorithm>
#include <memory>
#include <span>
#include <vector>

#include "kernels/codec.hpp"

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

// Those with keys wider than INT4.
std::vector<Sample> whole_blocks(const kv::HeadStreams& streams) {
  std::vector<Sample> whole;
  for (const Format format : {Format::kF16, Format::kInt8, Format::kK8V4}) {
    for (const BlockView& view : streams.by_format[static_cast<std::size_t>(format)]) {
      if (view.begin == 0 && view.end == kBlockTokens) whole.push_back({format, view});
    }
  }
  return whole;
}

// A few of them, spread over the context; where the spread begins moves on with the length.
std::vector<Sample> spread(std::span<const Sample> whole, std::int32_t length) {
  std::vector<Sample> chosen;
  chosen.reserve(kBlocks);
  const std::size_t offset = static_cast<std::size_t>(length) / kBlockTokens % whole.size();
  for (std::size_t i = 0; i < kBlocks; ++i)
    chosen.push_back(whole[(offset + i * whole.size() / kBlocks) % whole.size()]);
  return chosen;
}

// The streams of a head with its sample in another format.
kv::HeadStreams with_sample(const kv::HeadStreams& streams, std::span<const Sample> sample, Format format,
                            const std::byte* records, std::size_t record) {
  kv::HeadStreams changed = streams;
  const auto at = [](std::vector<BlockView>& views, std::int32_t start) {
    return std::lower_bound(views.begin(), views.end(), start,
                            [](const BlockView& view, std::int32_t position) { return view.start < position; });
  };
  auto& to = changed.by_format[static_cast<std::size_t>(format)];
  for (const Sample& block : sample) {
    auto& from = changed.by_format[static_cast<std::size_t>(block.format)];
    from.erase(at(from, block.view.start));
    const auto index = static_cast<std::size_t>(&block - sample.data());
    to.insert(at(to, block.view.start), {records + index * record, block.view.start, 0, kBlockTokens, kBlockTokens});
  }
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
  std::vector<double> weights;  // by kv head: blocks that a sampled one stands for
  for (std::size_t head = 0; head < shape.kv_heads; ++head) {
    std::vector<Sample> sample = whole_blocks(row.streams[head]);
    const std::size_t all = sample.size();
    if (all > kBlocks) sample = spread(sample, row.length);
    weights.push_back(all == 0 ? 0.0 : static_cast<double>(all) / static_cast<double>(sample.size()));
    wide.add(row.streams[head], sample, shape.d, *rows);
    narrow.add(row.streams[head], sample, shape.d, *rows);
  }
  if (std::all_of(weights.begin(), weights.end(), [](double weight) { return weight == 0.0; })) return std::nullopt;
  kv::KeyError found{};
  for (std::size_t i = 0; i < kQueries && i * kStride < row.tokens; ++i) {
    const std::size_t token = row.tokens - 1 - i * kStride;
    wide.attend(row, token, shape, executor);
    narrow.attend(row, token, shape, executor);
    for (std::size_t c = 0; c < wide.out.size(); ++c) {
      const double weight = weights[c / shape.d / shape.group];
      const double whole = wide.out[c];
      const double moved = static_cast<double>(narrow.out[c]) - whole;
      found.moved += weight * moved * moved;
      if (weight > 0.0) found.whole += whole * whole;
    }
  }
  return found;
}

}  // namespace inferos::attention
