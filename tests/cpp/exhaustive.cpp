// Every ISA against the scalar specification, and the specification against its properties in double.
//
//   exhaustive ROWS [SEED]     rows per kernel, "5e6" for example; a row is one channel over its tokens (K) or one token (V).
//
// From a million rows on, f32 -> fp16 runs over all 2^32 patterns; below, over every 4099th. Exit code 1 on any mismatch.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/fp16.hpp"
#include "kernels/block.hpp"
#include "kernels/hadamard.hpp"
#include "kernels/quantize.hpp"
#include "rows.hpp"

namespace {

using namespace inferos;           // NOLINT(google-build-using-namespace): a program, not a library
using namespace inferos::kernels;  // NOLINT(google-build-using-namespace)
using inferos::tests::fill;
using inferos::tests::kShapes;
using inferos::tests::Random;
using inferos::tests::Shape;

int passed = 0;
int failed = 0;

void report(const std::string& what, const std::string& mismatch) {
  ++(mismatch.empty() ? passed : failed);
  std::printf("%-4s %s%s%s\n", mismatch.empty() ? "ok" : "FAIL", what.c_str(), mismatch.empty() ? "" : ": ",
              mismatch.c_str());
  std::fflush(stdout);
}

template <class T>
constexpr const char* kTypeName = std::is_same_v<T, float> ? "f32" : "f16";

// ---- the parts of a block, addressed by name ----------------------------------------------------------------------

enum class Part { kK8, kK4, kV8, kV4 };
constexpr std::array kParts{Part::kK8, Part::kK4, Part::kV8, Part::kV4};
constexpr const char* name_of(Part part) { return std::array{"k8", "k4", "v8", "v4"}[static_cast<std::size_t>(part)]; }
constexpr bool is_key(Part part) { return part == Part::kK8 || part == Part::kK4; }
constexpr bool is_byte(Part part) { return part == Part::kK8 || part == Part::kV8; }
constexpr int steps_of(Part part) { return part == Part::kV8 ? 127 : is_byte(part) ? 255 : 15; }

constexpr std::size_t code_bytes(Part part, std::size_t d) {
  return is_byte(part) ? kBlockTokens * d : kBlockTokens * d / 2;
}
constexpr std::size_t scale_count(Part part, std::size_t d) {
  return is_key(part) ? 2 * d : part == Part::kV8 ? kBlockTokens : 2 * kBlockTokens;
}

template <class T>
const QuantizeOf<T>& family(const Quantize& table) {
  if constexpr (std::is_same_v<T, float>) {
    return table.f32;
  } else {
    return table.f16;
  }
}

struct Coded {
  std::array<std::uint8_t, kBlockTokens * kMaxHeadDim> codes;
  std::array<std::uint16_t, 2 * kMaxHeadDim> scales;
};

template <class T>
void quantize_with(const Quantize& table, Part part, const T* x, std::size_t tokens, std::size_t d, Coded& out) {
  const QuantizeOf<T>& f = family<T>(table);
  switch (part) {
    case Part::kK8: f.k8(x, tokens, d, out.codes.data(), out.scales.data()); break;
    case Part::kK4: f.k4(x, tokens, d, out.codes.data(), out.scales.data()); break;
    case Part::kV8: f.v8(x, tokens, d, reinterpret_cast<std::int8_t*>(out.codes.data()), out.scales.data()); break;
    case Part::kV4: f.v4(x, tokens, d, out.codes.data(), out.scales.data()); break;
  }
}

template <class T>
void dequantize_with(const Quantize& table, Part part, const Coded& in, std::size_t d, T* x) {
  const QuantizeOf<T>& f = family<T>(table);
  switch (part) {
    case Part::kK8: f.un_k8(in.codes.data(), in.scales.data(), d, x); break;
    case Part::kK4: f.un_k4(in.codes.data(), in.scales.data(), d, x); break;
    case Part::kV8: f.un_v8(reinterpret_cast<const std::int8_t*>(in.codes.data()), in.scales.data(), d, x); break;
    case Part::kV4: f.un_v4(in.codes.data(), in.scales.data(), d, x); break;
  }
}

// The code of (token, channel), read by the byte table of block.hpp.
int code_at(Part part, const Coded& coded, std::size_t t, std::size_t c, std::size_t d) {
  const std::size_t per_word = is_byte(part) ? 4 : 8;  // channels of a K word, tokens of a V word
  const std::size_t word = is_key(part) ? (t / 32 * (d / per_word) + c / per_word) * 32 + t % 32
                                        : (c / 16 * (kBlockTokens / per_word) + t / per_word) * 16 + c % 16;
  const std::size_t item = is_key(part) ? c : t;
  const std::uint8_t byte = coded.codes[word * 4 + item % 4];
  if (part == Part::kV8) return static_cast<std::int8_t>(byte);
  return is_byte(part) ? byte : item % 8 < 4 ? byte & 15 : byte >> 4;
}

double half_at(const Coded& coded, std::size_t i) { return static_cast<double>(f16_to_f32(coded.scales[i])); }

struct Grid {
  double scale, minimum;
};
Grid grid_at(Part part, const Coded& coded, std::size_t t, std::size_t c, std::size_t d) {
  if (is_key(part)) return {half_at(coded, c), half_at(coded, d + c)};
  return {half_at(coded, t), part == Part::kV8 ? 0.0 : half_at(coded, kBlockTokens + t)};
}

// ---- quantisers ---------------------------------------------------------------------------------------------------

double cleaned(float x) { return x != x ? 0.0 : std::clamp(static_cast<double>(x), -65504.0, 65504.0); }
double cleaned(std::uint16_t x) { return cleaned(f16_to_f32(x)); }

// One row's stored grid is the tightest that fp16 can hold, and its codes are nearest, ordered, and zero where there is no token.
template <class T, class At>
const char* broken_row(Part part, const T* x, std::size_t n, std::size_t stride, const Grid& grid, At code) {
  const double steps = steps_of(part);
  const double low_code = part == Part::kV8 ? -127.0 : 0.0;
  double low = cleaned(x[0]);
  double high = low;
  for (std::size_t i = 0; i < n; ++i) {
    const double value = cleaned(x[i * stride]);
    const double q = code(i);
    if (std::fabs(value - (grid.minimum + grid.scale * q)) > grid.scale / 2) return "half step";
    if (q < low_code || q > steps) return "code out of range";
    if (part == Part::kV8 && value == 0.0 && q != 0.0) return "zero does not stay zero";
    if (i > 0) {
      const double before = cleaned(x[(i - 1) * stride]);
      const double q_before = code(i - 1);
      if ((value > before && q < q_before) || (value < before && q > q_before)) return "not monotone";
    }
    low = std::min(low, value);
    high = std::max(high, value);
  }
  const auto neighbour = [](double half, int step) {
    return static_cast<double>(f16_to_f32(static_cast<std::uint16_t>(f32_to_f16(static_cast<float>(half)) + step)));
  };
  const double width = part == Part::kV8 ? std::max(high, -low) : high - grid.minimum;
  if (part != Part::kV8) {
    const double above = grid.minimum < 0.0 ? neighbour(grid.minimum, -1) : neighbour(grid.minimum, 1);
    if (grid.minimum > low || above <= low) return "minimum is not the largest fp16 below";
  }
  if (width / steps > grid.scale) return "scale too small";
  if (grid.scale > 0.0 && neighbour(grid.scale, -1) >= width / steps) return "scale is not the smallest";
  return nullptr;
}

template <class T>
std::string broken(Part part, const T* x, std::size_t tokens, std::size_t d, const Coded& coded) {
  const std::size_t rows = is_key(part) ? d : tokens;
  for (std::size_t r = 0; r < rows; ++r) {
    const char* problem = nullptr;
    if (is_key(part)) {
      problem = broken_row(part, x + r, tokens, d, grid_at(part, coded, 0, r, d),
                           [&](std::size_t t) { return static_cast<double>(code_at(part, coded, t, r, d)); });
    } else {
      problem = broken_row(part, x + r * d, d, 1, grid_at(part, coded, r, 0, d),
                           [&](std::size_t c) { return static_cast<double>(code_at(part, coded, r, c, d)); });
    }
    if (problem != nullptr) return "row " + std::to_string(r) + ": " + problem;
  }
  for (std::size_t t = tokens; t < kBlockTokens; ++t) {
    for (std::size_t c = 0; c < d; ++c) {
      if (code_at(part, coded, t, c, d) != 0) return "a code where there is no token";
    }
    if (!is_key(part) && (coded.scales[t] != 0 || (part == Part::kV4 && coded.scales[kBlockTokens + t] != 0))) {
      return "a scale where there is no token";
    }
  }
  return {};
}

std::string different(Part part, const Coded& a, const Coded& b, std::size_t d) {
  const auto code = std::mismatch(a.codes.begin(), a.codes.begin() + static_cast<std::ptrdiff_t>(code_bytes(part, d)),
                                  b.codes.begin());
  if (code.second != b.codes.begin() + static_cast<std::ptrdiff_t>(code_bytes(part, d))) {
    return "code byte " + std::to_string(code.first - a.codes.begin());
  }
  const auto end = a.scales.begin() + static_cast<std::ptrdiff_t>(scale_count(part, d));
  const auto scale = std::mismatch(a.scales.begin(), end, b.scales.begin());
  return scale.first == end ? std::string() : "scale " + std::to_string(scale.first - a.scales.begin());
}

struct Size {
  std::size_t tokens, d;
};

// Mostly small, so that a given time covers many rows; every head_dim and token count comes up.
Size random_size(Random& random, bool key) {
  const std::size_t kind = random.below(64);
  if (kind == 0) return {1 + random.below(64), 16 * (1 + random.below(16))};
  if (key) return {1 + random.below(kind < 8 ? 64 : 6), 16 * (1 + random.below(4))};
  return {1 + random.below(64), 16};
}

template <class T>
struct QuantizeRun {
  Part part;
  std::size_t rows;
  std::uint64_t seed;
  alignas(64) std::array<T, kBlockTokens * kMaxHeadDim + 1> x{};
  Coded wanted{};
  Coded got{};

  std::string at(Size size, std::uint64_t block, Shape shape, const std::string& problem) const {
    return problem + " (seed " + std::to_string(seed) + ", block " + std::to_string(block) + ", shape " +
           std::to_string(static_cast<std::size_t>(shape)) + ", tokens " + std::to_string(size.tokens) + ", head_dim " +
           std::to_string(size.d) + ")";
  }

  void run() {
    const std::span<const Quantize> tables = quantize_runnable();
    std::vector<std::string> mismatch(tables.size());
    Random random(seed);
    std::size_t done = 0;
    for (std::uint64_t block = 0; done < rows; ++block) {
      const Size size = random_size(random, is_key(part));
      const auto shape = static_cast<Shape>(random.below(kShapes));
      T* from = x.data() + block % 2;  // every other block is not aligned
      fill(random, shape, from, size.tokens * size.d);
      quantize_with(tables[0], part, from, size.tokens, size.d, wanted);
      if (mismatch[0].empty()) {
        if (const std::string problem = broken(part, from, size.tokens, size.d, wanted); !problem.empty()) {
          mismatch[0] = at(size, block, shape, problem);
        }
      }
      for (std::size_t i = 1; i < tables.size(); ++i) {
        if (!mismatch[i].empty()) continue;
        quantize_with(tables[i], part, from, size.tokens, size.d, got);
        if (const std::string problem = different(part, wanted, got, size.d); !problem.empty()) {
          mismatch[i] = at(size, block, shape, problem);
        }
      }
      done += is_key(part) ? size.d : size.tokens;
    }
    for (std::size_t i = 0; i < tables.size(); ++i) {
      report(std::string("quantize ") + name_of(part) + " " + kTypeName<T> + " " +
                 std::string(isa_name(tables[i].isa)) + ", " + std::to_string(done) + " rows" +
                 (i == 0 ? ", properties" : ", bits"),
             mismatch[i]);
    }
  }
};

// ---- dequantisers -------------------------------------------------------------------------------------------------

bool same(float a, float b) {
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b) || (a != a && b != b);
}
bool same(std::uint16_t a, std::uint16_t b) { return a == b || ((a & 0x7FFFU) > 0x7C00U && (b & 0x7FFFU) > 0x7C00U); }

// minimum + scale * code with one rounding: the sum is exact in double wherever the scale is finite.
float exact_value(const Grid& grid, int code) { return static_cast<float>(grid.minimum + grid.scale * code); }
void narrow(float value, float& to) { to = value; }
void narrow(float value, std::uint16_t& to) { to = f32_to_f16_saturate(value); }

template <class T>
std::string wrong_value(Part part, const Coded& coded, std::size_t d, const T* x) {
  for (std::size_t t = 0; t < kBlockTokens; ++t) {
    for (std::size_t c = 0; c < d; ++c) {
      const Grid grid = grid_at(part, coded, t, c, d);
      const int code = code_at(part, coded, t, c, d);
      T wanted;
      narrow(part == Part::kV8 ? static_cast<float>(grid.scale * code) : exact_value(grid, code), wanted);
      if (!same(wanted, x[t * d + c])) return "token " + std::to_string(t) + ", channel " + std::to_string(c);
    }
  }
  return {};
}

// Every pair of a byte of codes and a fp16 scale, infinities and NaN among the scales; random finite minima.
void fill_codes(Random& random, Part part, std::size_t call, std::size_t d, Coded& coded) {
  const std::size_t bytes = code_bytes(part, d);
  for (std::size_t i = 0; i < bytes; ++i) {
    const std::size_t token = i / 4 % 32 + i / (bytes / 2) * 32;  // of a K tile: 32 tokens of 4 bytes, two tiles deep
    const std::size_t channel = i / 4 % 16 + i / (bytes * 16 / d) * 16;  // of a V tile: 16 channels of 4 bytes
    coded.codes[i] = static_cast<std::uint8_t>(is_key(part) ? call % 4 * 64 + token : channel);
  }
  const std::size_t grids = is_key(part) ? d : kBlockTokens;
  const std::size_t first = (is_key(part) ? call / 4 : call) * grids;
  for (std::size_t i = 0; i < grids; ++i) {
    coded.scales[i] = static_cast<std::uint16_t>(first + i);
    if (part == Part::kV8) continue;
    coded.scales[grids + i] = static_cast<std::uint16_t>(random.below(0x7C00) | random.below(2) << 15);
  }
}

template <class T>
void check_dequantizers(Part part, std::uint64_t seed) {
  constexpr std::size_t kD = kMaxHeadDim;
  constexpr std::size_t kHalves = 65536;
  const std::size_t calls = is_key(part) ? 4 * kHalves / kD : kHalves / kBlockTokens;
  const std::span<const Quantize> tables = quantize_runnable();
  std::vector<std::string> mismatch(tables.size());
  std::vector<T> wanted(kBlockTokens * kD);
  std::vector<T> got(kBlockTokens * kD);
  Coded coded{};
  Random random(seed);
  for (std::size_t call = 0; call < calls; ++call) {
    fill_codes(random, part, call, kD, coded);
    dequantize_with(tables[0], part, coded, kD, wanted.data());
    if (mismatch[0].empty()) mismatch[0] = wrong_value(part, coded, kD, wanted.data());
    for (std::size_t i = 1; i < tables.size(); ++i) {
      if (!mismatch[i].empty()) continue;
      dequantize_with(tables[i], part, coded, kD, got.data());
      for (std::size_t j = 0; j < got.size() && mismatch[i].empty(); ++j) {
        if (!same(wanted[j], got[j]))
          mismatch[i] =
              "seed " + std::to_string(seed) + ", call " + std::to_string(call) + ", index " + std::to_string(j);
      }
    }
  }
  for (std::size_t i = 0; i < tables.size(); ++i) {
    report(std::string("dequantize ") + name_of(part) + " " + kTypeName<T> + " " +
               std::string(isa_name(tables[i].isa)) +
               (is_byte(part) ? ", every code x every scale" : ", every byte x every scale"),
           mismatch[i]);
  }
}

// ---- rotation -----------------------------------------------------------------------------------------------------

// Against the matrix (-1)^popcount(i & j) / sqrt(n) in double.
std::string wrong_rotation(const float* x, const float* y, std::size_t d) {
  const std::size_t n = hadamard_size(d);
  const double root = std::sqrt(static_cast<double>(n));
  for (std::size_t i = 0; i < d; ++i) {
    const float* chunk = x + i / n * n;
    double sum = 0.0;
    double absolute = 0.0;
    for (std::size_t j = 0; j < n; ++j) {
      const double value = static_cast<double>(chunk[j]);
      sum += std::popcount(i % n & j) % 2 == 0 ? value : -value;
      absolute += std::fabs(value);
    }
    const double bound = (std::log2(static_cast<double>(n)) + 2.0) * 0x1p-24 * absolute / root + 0x1p-149;
    if (std::fabs(sum / root - static_cast<double>(y[i])) > bound) return "channel " + std::to_string(i);
  }
  return {};
}

void check_rotation(std::size_t rows, std::uint64_t seed) {
  const std::span<const Hadamard> tables = hadamard_runnable();
  std::vector<std::string> mismatch(tables.size());
  std::vector<float> x(kBlockTokens * kMaxHeadDim);
  std::vector<float> wanted(x.size());
  std::vector<float> got(x.size());
  Random random(seed);
  std::size_t done = 0;
  for (std::uint64_t block = 0; done < rows; ++block) {
    const std::size_t d = random.below(16) == 0 ? 16 * (1 + random.below(16)) : std::size_t{16} << random.below(2);
    const std::size_t count = 1 + random.below(kBlockTokens);
    static constexpr std::array kFinite{Shape::kBell, Shape::kConstant, Shape::kOffset,
                                        Shape::kTies, Shape::kOutlier,  Shape::kTiny};
    fill(random, kFinite[random.below(kFinite.size())], x.data(), count * d);
    std::copy_n(x.begin(), count * d, wanted.begin());
    tables[0].rotate(wanted.data(), count, d);
    const std::string where = " (seed " + std::to_string(seed) + ", block " + std::to_string(block) + ", rows " +
                              std::to_string(count) + ", head_dim " + std::to_string(d) + ")";
    if (mismatch[0].empty()) {  // one row of the block: the matrix costs n times as much as the kernel
      const std::size_t row = random.below(count) * d;
      if (const std::string problem = wrong_rotation(x.data() + row, wanted.data() + row, d); !problem.empty())
        mismatch[0] = problem + where;
    }
    for (std::size_t i = 1; i < tables.size(); ++i) {
      if (!mismatch[i].empty()) continue;
      std::copy_n(x.begin(), count * d, got.begin());
      tables[i].rotate(got.data(), count, d);
      if (std::memcmp(wanted.data(), got.data(), count * d * sizeof(float)) != 0) mismatch[i] = "bits" + where;
    }
    done += count;
  }
  for (std::size_t i = 0; i < tables.size(); ++i) {
    report("rotate " + std::string(isa_name(tables[i].isa)) + ", " + std::to_string(done) + " rows" +
               (i == 0 ? ", matrix" : ", bits"),
           mismatch[i]);
  }
}

// ---- conversions --------------------------------------------------------------------------------------------------

// What f32_to_f16 must return, from the definition: the halves in ascending order, each with the last float that rounds to it.
class NearestHalf {
 public:
  NearestHalf() { enter(0); }
  // `magnitude` not below the one asked before.
  std::uint16_t operator()(std::uint32_t magnitude) {
    if (magnitude > 0x7F80'0000U) return static_cast<std::uint16_t>(0x7E00U | (magnitude >> 13 & 0x3FFU));
    while (magnitude > last_) enter(half_ + 1);
    return static_cast<std::uint16_t>(half_);
  }
  std::uint32_t last() const { return last_; }

 private:
  static double value(
      std::uint32_t half) {  // 0x7C00 counts as 65536: where rounding to infinity begins is half way to there
    const std::uint32_t exponent = half >> 10;
    return exponent == 0 ? std::ldexp(half, -24)
                         : std::ldexp((half & 0x3FFU) + 0x400U, static_cast<int>(exponent) - 25);
  }
  void enter(std::uint32_t half) {
    half_ = half;
    last_ = 0x7F80'0000U;
    if (half >= 0x7C00U) return;
    const auto tie = static_cast<float>((value(half) + value(half + 1)) / 2);  // 12 significant bits: exact
    last_ = std::bit_cast<std::uint32_t>(tie) - half % 2;                      // a tie goes to the even neighbour
  }
  std::uint32_t half_ = 0;
  std::uint32_t last_ = 0;
};

std::uint16_t saturated(std::uint16_t half) {
  return (half & 0x7FFFU) == 0x7C00U ? static_cast<std::uint16_t>(half - 1) : half;
}

struct HalfSweep {
  static constexpr std::size_t kChunk = 16384;
  std::span<const Convert> tables = convert_runnable();
  std::vector<std::string> mismatch = std::vector<std::string>(2 * tables.size());
  std::vector<float> x = std::vector<float>(kChunk);
  std::vector<std::uint16_t> wanted[2] = {std::vector<std::uint16_t>(kChunk), std::vector<std::uint16_t>(kChunk)};
  std::vector<std::uint16_t> got = std::vector<std::uint16_t>(kChunk);

  void compare() {
    for (std::size_t i = 0; i < mismatch.size(); ++i) {
      const Convert& table = tables[i / 2];
      (i % 2 == 0 ? table.f32_to_f16 : table.f32_to_f16_saturate)(x.data(), kChunk, got.data());
      if (!mismatch[i].empty() || std::memcmp(got.data(), wanted[i % 2].data(), kChunk * 2) == 0) continue;
      const auto first = std::mismatch(got.begin(), got.end(), wanted[i % 2].begin()).first - got.begin();
      char bits[32];
      std::snprintf(bits, sizeof bits, "pattern 0x%08x",
                    std::bit_cast<std::uint32_t>(x[static_cast<std::size_t>(first)]));
      mismatch[i] = bits;
    }
  }

  void run(std::uint64_t stride) {
    std::uint64_t count = 0;
    for (const std::uint32_t sign : {0U, 0x8000'0000U}) {
      NearestHalf nearest;
      for (std::uint64_t pattern = 0; pattern < 0x8000'0000U; pattern += kChunk * stride) {
        for (std::size_t j = 0; j < kChunk; ++j) {
          x[j] = std::bit_cast<float>(
              static_cast<std::uint32_t>(std::min<std::uint64_t>(pattern + j * stride, 0x7FFF'FFFFU)) | sign);
        }
        for (std::size_t j = 0; j < kChunk;) {
          const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(x[j]) & 0x7FFF'FFFFU;
          const auto half = static_cast<std::uint16_t>(nearest(magnitude) | sign >> 16);
          // Stride 1 fills whole runs; NaN has payloads, so no runs.
          const std::size_t run = stride == 1 && magnitude <= 0x7F80'0000U ? nearest.last() - magnitude + 1 : 1;
          const std::size_t end = std::min(kChunk, j + run);
          std::fill(wanted[0].begin() + static_cast<std::ptrdiff_t>(j),
                    wanted[0].begin() + static_cast<std::ptrdiff_t>(end), half);
          j = end;
        }
        // NaN keeps its quiet bit, so saturated() cannot mistake one for an infinity.
        std::transform(wanted[0].begin(), wanted[0].end(), wanted[1].begin(), saturated);
        compare();
        count += kChunk;
      }
    }
    for (std::size_t i = 0; i < mismatch.size(); ++i) {
      report(std::string("f32 -> f16 ") + (i % 2 == 0 ? "" : "saturating ") + std::string(isa_name(tables[i / 2].isa)) +
                 ", " + std::to_string(count) + " patterns",
             mismatch[i]);
    }
  }
};

void check_f16_to_f32() {
  for (const Convert& table : convert_runnable()) {
    std::string mismatch;
    std::vector<std::uint16_t> x(65536);
    std::vector<float> y(65536);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::uint16_t>(i);
    table.f16_to_f32(x.data(), x.size(), y.data());
    for (std::size_t i = 0; i < x.size() && mismatch.empty(); ++i) {
      const std::size_t exponent = i >> 10 & 31;
      const auto mantissa = static_cast<double>(i & 0x3FF);
      const double magnitude = exponent == 31  ? HUGE_VAL
                               : exponent == 0 ? std::ldexp(mantissa, -24)
                                               : std::ldexp(mantissa + 1024, static_cast<int>(exponent) - 25);
      const bool nan = exponent == 31 && (i & 0x3FF) != 0;
      const auto nan_bits = static_cast<std::uint32_t>((i & 0x8000) << 16 | 0x7FC0'0000U | (i & 0x3FF) << 13);
      const float wanted =
          nan ? std::bit_cast<float>(nan_bits) : static_cast<float>(i < 0x8000 ? magnitude : -magnitude);
      if (std::bit_cast<std::uint32_t>(wanted) != std::bit_cast<std::uint32_t>(y[i]))
        mismatch = "half " + std::to_string(i);
    }
    report("f16 -> f32 " + std::string(isa_name(table.isa)) + ", 65536 patterns", mismatch);
  }
}

// Lengths 0..67 from every offset: the tail neither misses a value nor writes past the end.
void check_tails() {
  for (const Convert& table : convert_runnable()) {
    std::string mismatch;
    for (std::size_t n = 0; n <= 67; ++n) {
      std::vector<float> x(n);
      for (std::size_t i = 0; i < n; ++i) x[i] = static_cast<float>(i) + 0.5F;
      std::vector<std::uint16_t> y(n + 1, 0xABCD);
      std::vector<float> back(n + 1, -1.0F);
      table.f32_to_f16_saturate(x.data(), n, y.data());
      table.f16_to_f32(y.data(), n, back.data());
      if (!std::equal(x.begin(), x.end(), back.begin()) || y[n] != 0xABCD || back[n] != -1.0F)
        mismatch = "length " + std::to_string(n);
    }
    report("conversion tails " + std::string(isa_name(table.isa)), mismatch);
  }
}

template <class T>
void check_quantizers(std::size_t rows, std::uint64_t seed) {
  for (const Part part : kParts) {
    check_dequantizers<T>(part, seed);
    const auto run = std::make_unique<QuantizeRun<T>>();
    run->part = part;
    run->rows = rows;
    run->seed = seed;
    run->run();
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double wanted = argc > 1 ? std::strtod(argv[1], nullptr) : 0.0;
  if (!(wanted >= 1.0 && wanted <= 1e12)) {
    std::fprintf(stderr, "usage: exhaustive ROWS [SEED]   rows per kernel, for example 5e6\n");
    return 2;
  }
  const auto rows = static_cast<std::size_t>(wanted);
  const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  check_tails();
  check_f16_to_f32();
  HalfSweep{}.run(rows >= 1'000'000 ? 1 : 4099);
  check_rotation(rows, seed);
  check_quantizers<float>(rows, seed);
  check_quantizers<std::uint16_t>(rows, seed);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
