#include "kv/block.hpp"

#include <algorithm>

#include "kernels/codec.hpp"

namespace inferos::kv {
namespace {

kernels::BlockRows& scratch() {
  thread_local const auto rows = std::make_unique<kernels::BlockRows>();  // 128 KiB: too large for a stack
  return *rows;
}

double normalised_error(const float* from, const float* to, std::size_t n) noexcept {
  double error = 0.0;
  double power = 0.0;
  for (std::size_t i = 0; i < n; ++i) {
    const double x = from[i];
    const double difference = static_cast<double>(to[i]) - x;
    error += difference * difference;
    power += x * x;
  }
  return error == 0.0 ? 0.0 : error / power;
}

}  // namespace

void convert_block(const Block& from, std::size_t tokens, std::size_t head_dim, Block& to, const Block* next) {
  kernels::BlockRows& rows = scratch();
  if (from.format() == Format::kF16) {
    const bool alike = next != nullptr && next->format() == Format::kF16;
    kernels::f16_to_block(to.format(), from.data(), head_dim, from.capacity(), tokens, alike ? next->data() : nullptr,
                          rows, to.data());
    return;
  }
  kernels::block_to_rows(from.format(), from.data(), head_dim, from.capacity(), tokens, rows);
  kernels::rows_to_block(to.format(), rows, tokens, head_dim, to.data());
}

BlockError block_error(const Block& from, const Block& to, std::size_t tokens, std::size_t head_dim) {
  thread_local const auto wide = std::make_unique<kernels::BlockRows>();
  kernels::BlockRows& narrow = scratch();
  kernels::block_to_rows(from.format(), from.data(), head_dim, from.capacity(), tokens, *wide);
  kernels::block_to_rows(to.format(), to.data(), head_dim, to.capacity(), tokens, narrow);
  return {normalised_error(wide->k, narrow.k, tokens * head_dim),
          normalised_error(wide->v, narrow.v, tokens * head_dim)};
}

void read_block(const Block& block, std::size_t token, std::size_t head_dim, float* k, float* v) {
  kernels::BlockRows& rows = scratch();
  kernels::block_to_rows(block.format(), block.data(), head_dim, block.capacity(), token + 1, rows);
  std::copy_n(rows.k + token * head_dim, head_dim, k);
  std::copy_n(rows.v + token * head_dim, head_dim, v);
}

}  // namespace inferos::kv
