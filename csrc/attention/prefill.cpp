// Many query tokens: (row x kv head x query tile) tasks. Each block is expanded once per tile and multiplied for all its rows.

#include <algorithm>
#include <atomic>
#include <limits>
#include <new>
#include <vector>

#include "attention/plan.hpp"
#include "kernels/hadamard.hpp"

namespace inferos::attention {
namespace {

using kernels::BlockView;
using kernels::kBlockTokens;

// Floats of a tile's queries: enough rows that a block's expansion is small beside its products, few enough for the L2 cache.
constexpr std::size_t kTileFloats = std::size_t{1} << 16;
// Rows of a tile at least, where that gives every thread three tiles to even out their lengths, and where it gives it one.
constexpr std::size_t kEvenRows = 64;
constexpr std::size_t kFewestRows = 16;

// Query tokens of a tile. What a query yields does not depend on the tile it is in, so the number of threads may decide.
std::size_t tile_tokens(std::span<const RowPlan> rows, const Shape& shape, std::size_t threads) noexcept {
  const auto tiles = [&](std::size_t tokens) {
    std::size_t sum = 0;
    for (const RowPlan& row : rows) sum += (row.tokens + tokens - 1) / tokens * shape.kv_heads;
    return sum;
  };
  std::size_t tokens = std::clamp<std::size_t>(kTileFloats / (shape.group * shape.d), 1, 1024);
  const auto shrink = [&](std::size_t wanted, std::size_t least_rows) {
    while (tiles(tokens) < wanted && tokens / 2 * shape.group >= least_rows) tokens /= 2;
  };
  if (threads > 1) {
    shrink(3 * threads, kEvenRows);
    shrink(threads, kFewestRows);
  }
  return tokens;
}

struct Tile {
  const RowPlan* row;
  std::size_t head;
  std::size_t first;  // query tokens [first, last) of the row
  std::size_t last;
};

// Grows with the largest tile a thread has seen and is kept, so that a call pays no page faults for it.
struct Scratch {
  Floats floats;
  std::vector<kernels::Visible> visible;
};

struct Work {
  kernels::PrefillTile tile;
  float* k;
  float* v;
};

Work lay_out(const Tile& tile, const Shape& shape, Scratch& scratch) {
  const std::size_t rows = (tile.last - tile.first) * shape.group;
  const std::size_t block = kBlockTokens * shape.d;
  const std::size_t wanted = 2 * block + rows * (2 * shape.d + 2);
  float* const k = scratch.floats.at_least(wanted);
  if (scratch.visible.size() < rows) scratch.visible.resize(rows);
  float* const q = k + 2 * block;
  float* const o = q + rows * shape.d;
  float* const m = o + rows * shape.d;
  float* const l = m + rows;
  const std::size_t width = shape.group * shape.d;
  for (std::size_t token = tile.first; token < tile.last; ++token) {
    const std::size_t i = token - tile.first;
    std::copy_n(tile.row->q + (token * shape.kv_heads + tile.head) * width, width, q + i * width);
    std::fill_n(scratch.visible.data() + i * shape.group, shape.group,
                visible_at(tile.row->position(token), shape.local_window));
  }
  std::fill_n(o, rows * shape.d, 0.0F);
  std::fill_n(m, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(l, rows, 0.0F);
  kernels::PrefillTile work{.q = q,
                            .rows = rows,
                            .d = shape.d,
                            .scale = shape.scale,
                            .softcap = shape.softcap,
                            .k = k,
                            .v = k + block,
                            .start = 0,
                            .begin = 0,
                            .end = 0,
                            .visible = scratch.visible.data(),
                            .o = o,
                            .m = m,
                            .l = l};
  return {work, k, k + block};
}

void run_tile(const Tile& tile, const Shape& shape) {
  static thread_local Scratch scratch;
  auto [work, k, v] = lay_out(tile, shape, scratch);
  const kernels::Visible seen{work.visible[0].first, work.visible[work.rows - 1].last};  // by the tile as a whole
  bool rotated = false;
  for (const kernels::Format format : kVisitOrder) {
    if (rotated && !kernels::v_is_rotated(format)) {
      kernels::hadamard().rotate(work.o, work.rows, shape.d);
      rotated = false;
    }
    const auto& list = tile.row->streams[tile.head].by_format[static_cast<std::size_t>(format)];
    for (const BlockView& block : blocks_within(list, seen)) {
      kernels::attend().expand(format, block, shape.d, k, v);
      work.start = block.start;
      work.begin = block.begin;
      work.end = block.end;
      kernels::attend().prefill(work);
      rotated = kernels::v_is_rotated(format);
    }
  }
  const std::size_t width = shape.group * shape.d;
  for (std::size_t i = 0; i < work.rows; ++i)
    finish_head(work.q + i * shape.d, work.o + i * shape.d, work.l[i], shape.d);
  for (std::size_t token = tile.first; token < tile.last; ++token) {
    std::copy_n(work.o + (token - tile.first) * width, width,
                tile.row->out + (token * shape.kv_heads + tile.head) * width);
  }
}

struct Call {
  const Shape& shape;
  std::vector<Tile> tiles;
  std::atomic<bool> out_of_memory{false};

  static void run(void* context, std::size_t i) noexcept {
    auto& call = *static_cast<Call*>(context);
    try {
      run_tile(call.tiles[i], call.shape);
    } catch (const std::bad_alloc&) {
      call.out_of_memory.store(true, std::memory_order_relaxed);
    }
  }
};

}  // namespace

void prefill_rows(std::span<const RowPlan> rows, const Shape& shape, Executor& executor) {
  Call call{shape, {}};
  const std::size_t tokens = tile_tokens(rows, shape, executor.concurrency());
  for (const RowPlan& row : rows) {
    // The last tiles see the most context: first, so that no thread starts the longest one at the end.
    for (std::size_t last = row.tokens; last > 0;) {
      const std::size_t first = (last - 1) / tokens * tokens;
      for (std::size_t head = 0; head < shape.kv_heads; ++head) call.tiles.push_back({&row, head, first, last});
      last = first;
    }
  }
  executor.parallel_for(call.tiles.size(), &Call::run, &call);
  if (call.out_of_memory.load()) throw std::bad_alloc();
}

}  // namespace inferos::attention
