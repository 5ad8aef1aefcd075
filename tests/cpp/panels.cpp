// Key panels on every ISA against the scalar specification, and the ways into a block against one another.
//
//   panels ROUNDS [SEED]     rounds of random blocks. Exit code 1 on any mismatch.

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/codec.hpp"
#include "kernels/panels.hpp"
#include "rows.hpp"

namespace {

using namespace inferos;           // NOLINT(google-build-using-namespace): a program, not a library
using namespace inferos::kernels;  // NOLINT(google-build-using-namespace)
using inferos::tests::fill;
using inferos::tests::Random;
using inferos::tests::Shape;

constexpr std::size_t kPanelTokens = 16;
constexpr std::uint16_t kUntouched = 0xBEEF;

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Every table with rows `stride` apart; one value behind each output must stay.
bool panels_agree(Random& random, Shape shape, std::size_t d) {
  const std::size_t stride = d + random.below(40);
  std::vector<float> rows((kPanelTokens - 1) * stride + d);
  fill(random, shape, rows.data(), rows.size());
  const Panels& scalar = panels_runnable().front();
  std::vector<std::uint16_t> wanted(kPanelTokens * d + 1, kUntouched);
  scalar.store(rows.data(), stride, d, wanted.data());
  std::vector<std::uint16_t> wanted_rows(wanted.size(), kUntouched);
  scalar.load(wanted.data(), d, wanted_rows.data());
  for (const Panels& table : panels_runnable()) {
    std::vector<std::uint16_t> panel(wanted.size(), kUntouched);
    table.store(rows.data(), stride, d, panel.data());
    std::vector<std::uint16_t> back(wanted.size(), kUntouched);
    table.load(panel.data(), d, back.data());
    if (!same(panel, wanted) || !same(back, wanted_rows)) return false;
  }
  return true;
}

// A run of tokens in one call and one by one; then packed directly and by way of f32 rows.
bool codec_agrees(Random& random, Shape shape, std::size_t d) {
  const std::size_t tokens = 1 + random.below(kBlockTokens);
  const std::size_t first = random.below(tokens);
  const std::size_t stride = d * (1 + random.below(3));
  std::vector<float> k(tokens * stride);
  std::vector<float> v(tokens * stride);
  fill(random, shape, k.data(), k.size());
  fill(random, shape, v.data(), v.size());
  std::vector<std::byte> single(f16_block_bytes(d, kBlockTokens));
  std::vector<std::byte> runs(single.size());
  for (std::size_t t = 0; t < tokens; ++t) {
    store_f16_tokens(single.data(), d, kBlockTokens, t, 1, k.data() + t * stride, v.data() + t * stride, stride);
  }
  store_f16_tokens(runs.data(), d, kBlockTokens, 0, first, k.data(), v.data(), stride);
  store_f16_tokens(runs.data(), d, kBlockTokens, first, tokens - first, k.data() + first * stride,
                   v.data() + first * stride, stride);
  if (!same(single, runs)) return false;
  const auto rows = std::make_unique<BlockRows>();
  for (const Format format : {Format::kInt8, Format::kK8V4, Format::kInt4}) {
    std::vector<std::byte> direct(block_bytes(format, d));
    std::vector<std::byte> by_rows(direct.size());
    f16_to_block(format, runs.data(), d, kBlockTokens, tokens, single.data(), *rows, direct.data());
    block_to_rows(Format::kF16, runs.data(), d, kBlockTokens, tokens, *rows);
    rows_to_block(format, *rows, tokens, d, by_rows.data());
    if (!same(direct, by_rows)) return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const double wanted = argc > 1 ? std::strtod(argv[1], nullptr) : 0.0;
  if (!(wanted >= 1.0 && wanted <= 1e9)) {
    std::fprintf(stderr, "usage: panels ROUNDS [SEED]\n");
    return 2;
  }
  Random random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  constexpr std::array<std::size_t, 6> kHeadDims{16, 64, 80, 96, 128, 256};
  for (std::size_t round = 0; round < static_cast<std::size_t>(wanted); ++round) {
    const auto shape = static_cast<Shape>(random.below(inferos::tests::kShapes));
    const std::size_t d = kHeadDims[random.below(kHeadDims.size())];
    if (panels_agree(random, shape, d) && codec_agrees(random, shape, d)) continue;
    std::printf("FAIL round %zu: shape %d, head_dim %zu\n", round, static_cast<int>(shape), d);
    return 1;
  }
  std::printf("ok   %zu instruction sets\n", panels_runnable().size());
  return 0;
}
