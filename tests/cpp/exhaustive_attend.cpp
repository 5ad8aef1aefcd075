// Every ISA's attention against the scalar specification, bit for bit.
//
//   exhaustive_attend ROWS [SEED]     rows per kernel, "5e6" for example; a row is one token of a block seen by one query head.
//
// Blocks come from the codec over the row shapes of rows.hpp, so scales are subnormal, zero and huge as well. Exit code 1 on any mismatch.

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "core/fp16.hpp"
#include "kernels/attend.hpp"
#include "kernels/codec.hpp"
#include "rows.hpp"

namespace {

using namespace inferos;           // NOLINT(google-build-using-namespace): a program, not a library
using namespace inferos::kernels;  // NOLINT(google-build-using-namespace)
using inferos::tests::fill;
using inferos::tests::kShapes;
using inferos::tests::Random;
using inferos::tests::Shape;

constexpr std::array kFormatNames{"f16", "int8", "k8v4", "int4"};
constexpr std::array<std::size_t, 14> kHeadDims{16, 16, 16, 16, 32, 32, 48, 64, 64, 80, 112, 128, 192, 256};
constexpr std::size_t kMaxGroup = 9;
constexpr std::size_t kBlocks = 2;

int failed = 0;

bool same(float a, float b) {
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b) || (std::isnan(a) && std::isnan(b));
}

struct State {
  std::vector<float> o, m, l, extra;  // extra: logits, p, m and mass, or the tiles of a block

  State(std::size_t rows, std::size_t d, std::size_t more)
      : o(rows * d), m(rows, -std::numeric_limits<float>::infinity()), l(rows), extra(more) {}

  // "" or what differs. NaN is NaN; where the sum of a head is, the rest of it is unspecified.
  std::string difference(const State& want) const {
    const std::size_t d = o.size() / m.size();
    for (std::size_t r = 0; r < m.size(); ++r) {
      if (!same(l[r], want.l[r])) return "l of row " + std::to_string(r);
      if (std::isnan(l[r])) continue;
      if (!same(m[r], want.m[r])) return "m of row " + std::to_string(r);
      for (std::size_t c = 0; c < d; ++c) {
        if (!same(o[r * d + c], want.o[r * d + c]))
          return "o of row " + std::to_string(r) + ", channel " + std::to_string(c);
      }
    }
    for (std::size_t i = 0; i < extra.size(); ++i) {
      if (!same(extra[i], want.extra[i])) return "value " + std::to_string(i) + " of logits, p, m, mass or tiles";
    }
    return "";
  }
};

struct Case {
  Random random;
  Format format = Format::kF16;
  std::size_t d = 16;
  std::vector<float> q;
  std::vector<std::vector<std::byte>> records;
  std::vector<BlockView> views;
  std::unique_ptr<BlockRows> rows = std::make_unique<BlockRows>();

  explicit Case(std::uint64_t seed) : random(seed) {}

  Shape shape() { return static_cast<Shape>(random.below(kShapes)); }

  // Finite and below 2^90: what attend.hpp promises bits for. A third of them as large as real queries.
  void draw_queries(std::size_t heads) {
    q.resize(heads * d);
    fill(random, shape(), q.data(), q.size());
    const bool tame = random.below(3) != 0;
    for (float& x : q) {
      if (tame && std::fabs(x) > 4.0F) x = random.around_zero();
      if (!(std::fabs(x) < 0x1p90F)) x = random.around_zero();
    }
  }

  void draw_block(std::int32_t start) {
    const std::size_t tokens = 1 + random.below(kBlockTokens);
    const std::size_t begin = random.below(3) == 0 ? random.below(tokens + 1) : 0;
    const std::size_t capacity = format == Format::kF16 ? (tokens + 15) / 16 * 16 : kBlockTokens;
    fill(random, shape(), rows->k, tokens * d);
    fill(random, shape(), rows->v, tokens * d);
    const std::size_t bytes = format == Format::kF16 ? f16_block_bytes(d, capacity) : block_bytes(format, d);
    std::vector<std::byte>& record = records.emplace_back(bytes, std::byte{0xFF});  // NaN where no token is
    if (format == Format::kF16) {
      store_f16_tokens(record.data(), d, capacity, 0, tokens, rows->k, rows->v, d);
    } else {
      rows_to_block(format, *rows, tokens, d, record.data());
    }
    views.push_back({record.data(), start, static_cast<std::uint16_t>(begin), static_cast<std::uint16_t>(tokens),
                     static_cast<std::uint16_t>(capacity)});
  }

  Visible draw_visible() {
    if (random.below(2) == 0) return {0, std::numeric_limits<std::int32_t>::max()};
    const auto first = static_cast<std::int32_t>(random.below(100));
    return {first, first + static_cast<std::int32_t>(random.below(100))};
  }

  void draw(std::size_t heads) {
    d = kHeadDims[random.below(kHeadDims.size())];
    records.clear();
    views.clear();
    records.reserve(kBlocks);
    draw_queries(heads);
    for (std::size_t i = 0; i < kBlocks; ++i) draw_block(static_cast<std::int32_t>(i * kBlockTokens));
  }
};

std::size_t compare_decode(Case& test, std::string& mismatch) {
  const std::size_t group = 1 + test.random.below(kMaxGroup);
  test.draw(group);
  const Visible visible = test.draw_visible();
  const float scale = 1.0F / std::sqrt(static_cast<float>(test.d));
  const float softcap = test.random.below(4) == 0 ? 30.0F * test.random.unit() : 0.0F;
  const float skip_below = test.random.below(2) == 0 ? test.random.unit() : 0.0F;
  std::vector<State> states;
  for (const Attend& kernel : attend_runnable()) {
    const std::size_t logits = kBlocks * group * kBlockTokens;
    State& state = states.emplace_back(group, test.d, 2 * logits + kBlocks * (group + kBlockTokens));
    std::vector<std::uint16_t> p(logits);
    float* const m = state.extra.data() + 2 * logits;
    const auto masses = [&](State& of, std::size_t i) {
      return of.extra.data() + 2 * logits + kBlocks * group + i * kBlockTokens;
    };
    kernel.decode({test.q.data(), group, test.d, scale, softcap, skip_below, visible, test.format, test.views.data(),
                   kBlocks, false, nullptr, state.o.data(), state.m.data(), state.l.data(), state.extra.data(),
                   p.data(), m});
    for (std::size_t i = 0; i < logits; ++i) {  // those of a head whose sum is NaN are unspecified
      state.extra[logits + i] = std::isnan(state.l[i / kBlockTokens % group]) ? 0.0F : f16_to_f32(p[i]);
    }
    for (std::size_t i = 0; i < kBlocks; ++i) {
      kernel.mass(p.data() + i * group * kBlockTokens, m + i * group, group, state.m.data(), state.l.data(),
                  masses(state, i));
    }
    for (std::size_t i = 0; i < kBlocks * group; ++i) m[i] = std::isnan(state.l[i % group]) ? 0.0F : m[i];
    const std::string difference = state.difference(states.front());
    if (!difference.empty()) {
      mismatch = std::string(isa_name(kernel.isa)) + " head_dim " + std::to_string(test.d) + " group " +
                 std::to_string(group) + ": " + difference;
    }
  }
  return group * kBlocks * kBlockTokens;
}

std::size_t compare_prefill(Case& test, std::string& mismatch) {
  const std::size_t rows = 1 + test.random.below(test.random.below(8) == 0 ? 210 : 15);  // beyond a band of the kernels
  test.draw(rows);
  std::vector<Visible> visible(rows);
  for (Visible& seen : visible) seen = test.draw_visible();
  const float scale = 1.0F / std::sqrt(static_cast<float>(test.d));
  const float softcap = test.random.below(4) == 0 ? 30.0F * test.random.unit() : 0.0F;
  const std::size_t tile = kBlockTokens * test.d;
  std::vector<State> states;
  for (const Attend& kernel : attend_runnable()) {
    State& state = states.emplace_back(rows, test.d, 2 * tile * kBlocks);
    for (std::size_t i = 0; i < kBlocks; ++i) {
      const BlockView& block = test.views[i];
      float* const k = state.extra.data() + 2 * tile * i;
      kernel.expand(test.format, block, test.d, k, k + tile);
      kernel.prefill({test.q.data(), rows, test.d, scale, softcap, k, k + tile, block.start, block.begin, block.end,
                      visible.data(), state.o.data(), state.m.data(), state.l.data()});
    }
    const std::string difference = state.difference(states.front());
    if (!difference.empty()) {
      mismatch = std::string(isa_name(kernel.isa)) + " head_dim " + std::to_string(test.d) + " rows " +
                 std::to_string(rows) + ": " + difference;
    }
  }
  return rows * kBlocks * kBlockTokens;
}

void run(const char* what, std::size_t (*compare)(Case&, std::string&), std::size_t wanted, std::uint64_t seed) {
  for (std::size_t f = 0; f < kFormats; ++f) {
    std::string mismatch;
    std::size_t done = 0;
    std::uint64_t number = seed * 1'000'003 + f;
    for (; done < wanted && mismatch.empty(); number += kFormats) {
      Case test(number);
      test.format = static_cast<Format>(f);
      done += compare(test, mismatch);
    }
    if (!mismatch.empty()) ++failed;
    std::printf("%-4s %s %s, %zu rows, %zu ISAs%s%s\n", mismatch.empty() ? "ok" : "FAIL", what, kFormatNames[f], done,
                attend_runnable().size(), mismatch.empty() ? "" : ": ",
                mismatch.empty() ? "" : (mismatch + ", case " + std::to_string(number - kFormats)).c_str());
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double wanted = argc > 1 ? std::strtod(argv[1], nullptr) : 0.0;
  if (!(wanted >= 1.0 && wanted <= 1e12)) {
    std::fprintf(stderr, "usage: exhaustive_attend ROWS [SEED]   rows per kernel, for example 5e6\n");
    return 2;
  }
  const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  run("decode", compare_decode, static_cast<std::size_t>(wanted), seed);
  run("prefill", compare_prefill, static_cast<std::size_t>(wanted), seed);
  return failed == 0 ? 0 : 1;
}
