#pragma once
// One block of one (layer, kv head) in the arena. Packed blocks are never written again and may be shared by forks;
// a FP16 block belongs to one sequence.

#include <cstddef>
#include <cstring>
#include <memory>

#include "core/arena.hpp"
#include "kernels/block.hpp"

namespace inferos::kv {

using kernels::BlockView;
using kernels::Format;
using kernels::kBlockTokens;

class Block {
 public:
  // `capacity` tokens, 64 for packed formats. Error{kBudget}. Whoever holds a block also holds its arena.
  Block(Arena& arena, Format format, std::size_t head_dim, std::size_t capacity)
      : arena_(arena),
        bytes_(format == Format::kF16 ? kernels::f16_block_bytes(head_dim, capacity)
                                      : kernels::block_bytes(format, head_dim)),
        data_(arena.allocate(bytes_, static_cast<ArenaTag>(format))),
        capacity_(static_cast<std::uint16_t>(capacity)),
        format_(format) {}
  ~Block() { arena_.release(data_, bytes_, static_cast<ArenaTag>(format_)); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Its bytes at another place, which Arena::compact has chosen. For the only holder.
  void move_to(std::byte* place) noexcept {
    std::memcpy(place, data_, bytes_);
    data_ = place;
  }

  std::byte* data() const noexcept { return data_; }
  std::size_t bytes() const noexcept { return bytes_; }
  std::uint16_t capacity() const noexcept { return capacity_; }
  Format format() const noexcept { return format_; }

 private:
  Arena& arena_;
  std::size_t bytes_;
  std::byte* data_;
  std::uint16_t capacity_;
  Format format_;
};

static_assert(static_cast<int>(ArenaTag::kInt4) == static_cast<int>(Format::kInt4), "tags follow formats");

using BlockPtr = std::shared_ptr<Block>;

// `tokens` tokens of `from`, re-quantised into `to`, a packed block. `next`: what will be converted next, where that is known.
void convert_block(const Block& from, std::size_t tokens, std::size_t head_dim, Block& to, const Block* next = nullptr);

// Normalised squared errors |to - from|^2 / |from|^2 of `tokens` tokens; 0 where both are 0.
struct BlockError {
  double k;
  double v;
};
BlockError block_error(const Block& from, const Block& to, std::size_t tokens, std::size_t head_dim);

// One token of a block, un-rotated: k[head_dim], v[head_dim].
void read_block(const Block& block, std::size_t token, std::size_t head_dim, float* k, float* v);

}  // namespace inferos::kv
