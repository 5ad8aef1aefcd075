// _core.kernels: every kernel of every ISA on numpy arrays. Validate, view, unlock, call. Results go to arrays of the caller, so
// that he may keep them: fresh memory costs more than most of these kernels.

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <pybind11/stl.h>

#include "bindings/bindings.hpp"
#include "core/checked.hpp"
#include "core/cpu.hpp"
#include "core/error.hpp"
#include "kernels/codec.hpp"
#include "kernels/hadamard.hpp"
#include "kernels/importance.hpp"
#include "kernels/logits.hpp"
#include "kernels/quantize.hpp"

namespace inferos::bindings {
namespace {

using kernels::BlockRows;
using kernels::Format;
using kernels::kBlockTokens;
using kernels::QuantizeOf;

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Shape = std::vector<py::ssize_t>;

constexpr std::array<std::string_view, kernels::kFormats> kFormatNames{"f16", "int8", "k8v4", "int4"};

// The table called `isa`; "" is the active one.
template <class Table>
const Table& table_of(std::span<const Table> runnable, const Table& (*active)(), std::string_view isa) {
  if (isa.empty()) return active();
  std::string known;
  for (const Table& table : runnable) {
    if (isa_name(table.isa) == isa) return table;
    if (!known.empty()) known += ", ";
    known += isa_name(table.isa);
  }
  throw Error(ErrorCode::kConfig, "isa: '" + std::string(isa) + "' cannot run here; this CPU runs " + known);
}

std::string text(const py::array& array) {
  std::string out = "(";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    if (i > 0) out += ", ";
    out += std::to_string(array.shape(i));
  }
  return out + (array.ndim() == 1 ? ",)" : ")");
}

void require_shape(const char* function, const char* name, const py::array& array, const Shape& wanted) {
  if (std::equal(wanted.begin(), wanted.end(), array.shape(), array.shape() + array.ndim())) return;
  std::string expected;
  for (const py::ssize_t n : wanted) {
    if (!expected.empty()) expected += ", ";
    expected += std::to_string(n);
  }
  throw Error(ErrorCode::kShape,
              std::string(function) + ": " + name + " has shape " + text(array) + ", wanted (" + expected + ")");
}

std::size_t require_head_dim(const char* function, std::int64_t d) {
  if (d >= 0 && kernels::valid_head_dim(static_cast<std::size_t>(d))) return static_cast<std::size_t>(d);
  throw Error(ErrorCode::kShape, std::string(function) + ": head_dim is " + std::to_string(d) +
                                     ", wanted a multiple of 16 within 16..256");
}

struct RowsShape {
  std::size_t tokens, d;
};

// The last two dimensions of blocks of rows.
RowsShape require_rows(const char* function, const char* name, const py::array& x, bool one_block) {
  const py::ssize_t n = x.ndim();
  if (n < 2 || (one_block && n != 2) || x.shape(n - 2) < 1 || x.shape(n - 2) > static_cast<py::ssize_t>(kBlockTokens)) {
    throw Error(ErrorCode::kShape, std::string(function) + ": " + name + " has shape " + text(x) + ", wanted (" +
                                       (one_block ? "" : "..., ") + "1..64, head_dim)");
  }
  return {static_cast<std::size_t>(x.shape(n - 2)), require_head_dim(function, x.shape(n - 1))};
}

// What stands before the last `last` dimensions: the blocks.
Shape blocks_of(const py::array& x, py::ssize_t last) { return {x.shape(), x.shape() + x.ndim() - last}; }

Shape operator+(Shape blocks, const Shape& rest) {
  blocks.insert(blocks.end(), rest.begin(), rest.end());
  return blocks;
}

// One part of a packed block: its function names, and its arrays' shapes by block.hpp.
struct Part {
  const char* quantize;
  const char* dequantize;
  bool keys;
  int bits;

  Shape codes(std::size_t d) const {
    const auto n = static_cast<py::ssize_t>(d);
    if (keys) return {2, bits == 8 ? n / 4 : n / 8, 32, 4};
    return {n / 16, bits == 8 ? 16 : 8, 16, 4};
  }
  Shape scales(std::size_t d) const {
    if (keys) return {static_cast<py::ssize_t>(d)};
    return {static_cast<py::ssize_t>(kBlockTokens)};
  }
  std::size_t bytes(std::size_t d) const { return kBlockTokens * d * static_cast<std::size_t>(bits) / 8; }
  bool symmetric() const { return !keys && bits == 8; }
};

constexpr Part kK8{"quantize_k8", "dequantize_k8", true, 8};
constexpr Part kK4{"quantize_k4", "dequantize_k4", true, 4};
constexpr Part kV8{"quantize_v8", "dequantize_v8", false, 8};
constexpr Part kV4{"quantize_v4", "dequantize_v4", false, 4};

template <class T>
const QuantizeOf<T>& family(std::string_view isa) {
  const kernels::Quantize& table = table_of(kernels::quantize_runnable(), kernels::quantize, isa);
  if constexpr (std::is_same_v<T, float>) {
    return table.f32;
  } else {
    return table.f16;
  }
}

template <class T, class Code>
using QuantizeMember = void (*QuantizeOf<T>::*)(const T*, std::size_t, std::size_t, Code*, std::uint16_t*) noexcept;
template <class T, class Code>
using DequantizeMember = void (*QuantizeOf<T>::*)(const Code*, const std::uint16_t*, std::size_t, T*) noexcept;

// fp16, which pybind11 has no C++ type for: an array checked by hand.
constexpr int kNumpyHalf = 23;  // NPY_HALF
bool is_half(const py::array& array) { return array.dtype().num() == kNumpyHalf; }

void require_half(const char* function, const char* name, const py::array& array) {
  if (is_half(array) && (array.flags() & py::array::c_style) != 0) return;
  throw py::type_error(std::string(function) + ": " + name + " is not a C-contiguous array of float16");
}

const std::uint16_t* halves(const py::array& array) { return static_cast<const std::uint16_t*>(array.data()); }
std::uint16_t* mutable_halves(py::array& array) { return static_cast<std::uint16_t*>(array.mutable_data()); }

using Minima = std::optional<py::array>;

// Shapes of a part's arrays for rows of this shape.
void require_part(const char* function, const Part& part, const Shape& blocks, std::size_t d, const py::array& codes,
                  const py::array& scales, const Minima& minima) {
  require_half(function, "scales", scales);
  if (minima) require_half(function, "minima", *minima);
  require_shape(function, "codes", codes, blocks + part.codes(d));
  require_shape(function, "scales", scales, blocks + part.scales(d));
  if (minima.has_value() == part.symmetric()) {
    throw Error(ErrorCode::kShape, std::string(function) +
                                       (part.symmetric() ? ": minima are given, wanted none" : ": minima are missing"));
  }
  if (minima) require_shape(function, "minima", *minima, blocks + part.scales(d));
}

// float32 or float16 rows.
template <class Run>
void with_rows(const char* function, const char* name, const py::array& rows, Run run) {
  if ((rows.flags() & py::array::c_style) == 0 ||
      !(is_half(rows) || rows.dtype().num() == py::dtype::num_of<float>())) {
    throw py::type_error(std::string(function) + ": " + name + " is not a C-contiguous array of float32 or float16");
  }
  if (is_half(rows)) {
    run(std::uint16_t{});
  } else {
    run(float{});
  }
}

template <class T, class Code>
void quantize_part(const Part& part, QuantizeMember<T, Code> member, const py::array& x, Array<Code>& codes,
                   py::array& scales, Minima& minima, const std::string& isa) {
  const RowsShape rows = require_rows(part.quantize, "x", x, false);
  require_part(part.quantize, part, blocks_of(x, 2), rows.d, codes, scales, minima);
  const auto run = family<T>(isa).*member;
  const std::size_t grids = part.keys ? rows.d : kBlockTokens;
  const auto blocks = static_cast<std::size_t>(scales.size()) / grids;
  const std::size_t size = part.bytes(rows.d);
  const auto* from = static_cast<const T*>(x.data());
  Code* to = codes.mutable_data();
  std::uint16_t* to_scales = mutable_halves(scales);
  std::uint16_t* to_minima = minima ? mutable_halves(*minima) : nullptr;
  const py::gil_scoped_release unlocked;
  std::uint16_t grid[2 * kernels::kMaxHeadDim];
  for (std::size_t b = 0; b < blocks; ++b) {
    run(from + b * rows.tokens * rows.d, rows.tokens, rows.d, to + b * size, grid);
    std::copy_n(grid, grids, to_scales + b * grids);
    if (to_minima != nullptr) std::copy_n(grid + grids, grids, to_minima + b * grids);
  }
}

template <class T, class Code>
void dequantize_part(const Part& part, DequantizeMember<T, Code> member, const Array<Code>& codes,
                     const py::array& scales, const Minima& minima, py::array& out, const std::string& isa) {
  const RowsShape rows = require_rows(part.dequantize, "out", out, false);
  require_part(part.dequantize, part, blocks_of(out, 2), rows.d, codes, scales, minima);
  const auto run = family<T>(isa).*member;
  const std::size_t grids = part.keys ? rows.d : kBlockTokens;
  const auto blocks = static_cast<std::size_t>(scales.size()) / grids;
  const std::size_t size = rows.tokens * rows.d;
  const Code* from = codes.data();
  const std::uint16_t* from_scales = halves(scales);
  const std::uint16_t* from_minima = minima ? halves(*minima) : nullptr;
  auto* to = static_cast<T*>(out.mutable_data());
  const py::gil_scoped_release unlocked;
  // Kernels write whole blocks.
  const auto whole = rows.tokens < kBlockTokens ? std::make_unique<T[]>(kBlockTokens * rows.d) : nullptr;
  std::uint16_t grid[2 * kernels::kMaxHeadDim];
  for (std::size_t b = 0; b < blocks; ++b) {
    std::copy_n(from_scales + b * grids, grids, grid);
    if (from_minima != nullptr) std::copy_n(from_minima + b * grids, grids, grid + grids);
    run(from + b * part.bytes(rows.d), grid, rows.d, whole ? whole.get() : to + b * size);
    if (whole) std::copy_n(whole.get(), size, to + b * size);
  }
}

template <class Code>
void add_part(py::module_& m, const Part& part, QuantizeMember<float, Code> f32,
              QuantizeMember<std::uint16_t, Code> f16, DequantizeMember<float, Code> un_f32,
              DequantizeMember<std::uint16_t, Code> un_f16) {
  m.def(
      part.quantize,
      [&part, f32, f16](const py::array& x, Array<Code> codes, py::array scales, Minima minima,
                        const std::string& isa) {
        with_rows(part.quantize, "x", x, [&]<class T>(T) {
          if constexpr (std::is_same_v<T, float>) {
            quantize_part(part, f32, x, codes, scales, minima, isa);
          } else {
            quantize_part(part, f16, x, codes, scales, minima, isa);
          }
        });
      },
      py::arg("x").noconvert(), py::arg("codes").noconvert(), py::arg("scales").noconvert(),
      py::arg("minima").noconvert(), py::arg("isa") = "",
      "(..., tokens, head_dim) float32 or float16 -> codes in block order, float16 scales and minima");
  m.def(
      part.dequantize,
      [&part, un_f32, un_f16](const Array<Code>& codes, const py::array& scales, const Minima& minima, py::array out,
                              const std::string& isa) {
        with_rows(part.dequantize, "out", out, [&]<class T>(T) {
          if constexpr (std::is_same_v<T, float>) {
            dequantize_part(part, un_f32, codes, scales, minima, out, isa);
          } else {
            dequantize_part(part, un_f16, codes, scales, minima, out, isa);
          }
        });
      },
      py::arg("codes").noconvert(), py::arg("scales").noconvert(), py::arg("minima").noconvert(),
      py::arg("out").noconvert(), py::arg("isa") = "", "codes, float16 scales and minima -> (..., tokens, head_dim)");
}

template <class From, class To>
void convert_all(const char* function, const Array<From>& x, Array<To> y,
                 void (*run)(const From*, std::size_t, To*) noexcept) {
  require_shape(function, "out", y, Shape(x.shape(), x.shape() + x.ndim()));
  const From* from = x.data();
  To* to = y.mutable_data();
  const auto n = static_cast<std::size_t>(x.size());
  const py::gil_scoped_release unlocked;
  run(from, n, to);
}

void f32_to_f16(const Array<float>& x, const Array<std::uint16_t>& out, bool saturate, const std::string& isa) {
  const kernels::Convert& table = table_of(kernels::convert_runnable(), kernels::convert, isa);
  convert_all("to_f16", x, out, saturate ? table.f32_to_f16_saturate : table.f32_to_f16);
}

void f16_to_f32(const Array<std::uint16_t>& x, const Array<float>& out, const std::string& isa) {
  convert_all("to_f32", x, out, table_of(kernels::convert_runnable(), kernels::convert, isa).f16_to_f32);
}

void rotate(const Array<float>& x, Array<float> out, const std::string& isa) {
  constexpr std::size_t kRows = 16;  // copied and rotated while they are in L1
  if (x.ndim() < 2) {
    throw Error(ErrorCode::kShape, "rotate: x has shape " + text(x) + ", wanted (..., rows, head_dim)");
  }
  const std::size_t d = require_head_dim("rotate", x.shape(x.ndim() - 1));
  require_shape("rotate", "out", out, Shape(x.shape(), x.shape() + x.ndim()));
  const auto run = table_of(kernels::hadamard_runnable(), kernels::hadamard, isa).rotate;
  const auto rows = static_cast<std::size_t>(x.size()) / d;
  const float* from = x.data();
  float* to = out.mutable_data();
  const py::gil_scoped_release unlocked;
  for (std::size_t row = 0; row < rows; row += kRows) {
    const std::size_t count = std::min(kRows, rows - row);
    if (from != to) std::copy_n(from + row * d, count * d, to + row * d);
    run(to + row * d, count, d);
  }
}

const kernels::Logits& logits_of(std::string_view isa) {
  return table_of(kernels::logits_runnable(), kernels::logits, isa);
}

Array<float> per_chunk(std::size_t n) {
  return Array<float>(static_cast<py::ssize_t>((n + kernels::kLogitsChunk - 1) / kernels::kLogitsChunk));
}

py::tuple logits_largest(const Array<float>& x, const std::string& isa) {
  const auto n = static_cast<std::size_t>(x.size());
  Array<float> tops = per_chunk(n);
  const float top = logits_of(isa).largest(x.data(), n, tops.mutable_data());
  return py::make_tuple(top, std::move(tops));
}

py::tuple logits_weigh(const Array<float>& x, float top, float inverse_temperature, const std::string& isa) {
  const auto n = static_cast<std::size_t>(x.size());
  Array<float> sums = per_chunk(n);
  const double total = logits_of(isa).weigh(x.data(), n, top, inverse_temperature, sums.mutable_data());
  return py::make_tuple(total, std::move(sums));
}

Array<std::int32_t> logits_at_least(const Array<float>& x, float threshold, const std::string& isa) {
  std::vector<std::int32_t> positions(static_cast<std::size_t>(x.size()));
  const std::size_t count = logits_of(isa).at_least(x.data(), positions.size(), threshold, positions.data());
  return Array<std::int32_t>(static_cast<py::ssize_t>(count), positions.data());
}

const kernels::Importance& importance_of(std::string_view isa) {
  return table_of(kernels::importance_runnable(), kernels::importance, isa);
}

void importance_fold(py::array average, const Array<float>& mass, float keep, float add, const std::string& isa) {
  const std::size_t n = checked_range(mass.size(), 1, kBlockTokens, "importance_fold: tokens");
  require_half("importance_fold", "average", average);
  require_shape("importance_fold", "average", average, {mass.size()});
  importance_of(isa).fold(mutable_halves(average), mass.data(), n, keep, add);
}

double importance_heaviest(const py::array& average, const py::array& norm, const std::string& isa) {
  const std::size_t n = checked_range(average.size(), 1, kBlockTokens, "importance_heaviest: tokens");
  require_half("importance_heaviest", "average", average);
  require_half("importance_heaviest", "norm", norm);
  require_shape("importance_heaviest", "norm", norm, {average.size()});
  return importance_of(isa).heaviest(halves(average), halves(norm), n);
}

Format format_named(std::string_view name) {
  const auto found = std::find(kFormatNames.begin(), kFormatNames.end(), name);
  if (found != kFormatNames.end()) return static_cast<Format>(found - kFormatNames.begin());
  throw Error(ErrorCode::kConfig, "format: '" + std::string(name) + "' is not one of f16, int8, k8v4, int4");
}

void pack(Format format, const float* k, const float* v, RowsShape rows, std::byte* block) {
  if (format == Format::kF16) {
    std::fill_n(block, kernels::block_bytes(format, rows.d), std::byte{0});
    kernels::store_f16_tokens(block, rows.d, kBlockTokens, 0, rows.tokens, k, v, rows.d);
    return;
  }
  const auto scratch = std::make_unique<BlockRows>();
  std::copy_n(k, rows.tokens * rows.d, scratch->k);
  std::copy_n(v, rows.tokens * rows.d, scratch->v);
  kernels::rows_to_block(format, *scratch, rows.tokens, rows.d, block);
}

Array<std::uint8_t> pack_block(const std::string& format_name, const Array<float>& k, const Array<float>& v) {
  const Format format = format_named(format_name);
  const RowsShape rows = require_rows("pack_block", "k", k, true);
  require_shape("pack_block", "v", v, {k.shape(0), k.shape(1)});
  Array<std::uint8_t> block(static_cast<py::ssize_t>(kernels::block_bytes(format, rows.d)));
  const float* from_k = k.data();
  const float* from_v = v.data();
  auto* to = reinterpret_cast<std::byte*>(block.mutable_data());
  const py::gil_scoped_release unlocked;
  pack(format, from_k, from_v, rows, to);
  return block;
}

py::tuple unpack_block(const std::string& format_name, const Array<std::uint8_t>& block, std::int64_t head_dim,
                       std::int64_t tokens) {
  const Format format = format_named(format_name);
  const std::size_t d = require_head_dim("unpack_block", head_dim);
  const std::size_t n = checked_range(tokens, 1, kBlockTokens, "unpack_block: tokens");
  require_shape("unpack_block", "block", block, {static_cast<py::ssize_t>(kernels::block_bytes(format, d))});
  Array<float> k({n, d});
  Array<float> v({n, d});
  const auto* from = reinterpret_cast<const std::byte*>(block.data());
  float* to_k = k.mutable_data();
  float* to_v = v.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    const auto scratch = std::make_unique<BlockRows>();
    kernels::block_to_rows(format, from, d, kBlockTokens, n, *scratch);
    std::copy_n(scratch->k, n * d, to_k);
    std::copy_n(scratch->v, n * d, to_v);
  }
  return py::make_tuple(std::move(k), std::move(v));
}

}  // namespace

void add_kernels(py::module_& core) {
  py::module_ m = core.def_submodule(
      "kernels", "Quantisers, conversions and the rotation of every ISA; \"\" names the active one.");
  m.def("active_isa", [] { return std::string(isa_name(active_isa())); }, "The ISA in use");
  m.def(
      "runnable_isas",
      [] {
        std::vector<std::string> names;
        for (const Isa isa : runnable_isas()) names.emplace_back(isa_name(isa));
        return names;
      },
      "ISAs this CPU runs, scalar first, fastest last");
  using F = QuantizeOf<float>;
  using H = QuantizeOf<std::uint16_t>;
  add_part<std::uint8_t>(m, kK8, &F::k8, &H::k8, &F::un_k8, &H::un_k8);
  add_part<std::uint8_t>(m, kK4, &F::k4, &H::k4, &F::un_k4, &H::un_k4);
  add_part<std::int8_t>(m, kV8, &F::v8, &H::v8, &F::un_v8, &H::un_v8);
  add_part<std::uint8_t>(m, kV4, &F::v4, &H::v4, &F::un_v4, &H::un_v4);
  m.def("f32_to_f16", &f32_to_f16, py::arg("x").noconvert(), py::arg("out").noconvert(), py::arg("saturate") = false,
        py::arg("isa") = "", "float32 -> fp16 bits in uint16, nearest even");
  m.def("f16_to_f32", &f16_to_f32, py::arg("x").noconvert(), py::arg("out").noconvert(), py::arg("isa") = "",
        "fp16 bits in uint16 -> float32");
  m.def("rotate", &rotate, py::arg("x").noconvert(), py::arg("out").noconvert(), py::arg("isa") = "",
        "(..., rows, head_dim) float32, rotated by the Hadamard transform; out may be x");
  m.def("logits_largest", &logits_largest, py::arg("x").noconvert(), py::arg("isa") = "",
        "The largest finite logit, and that of each chunk of 512");
  m.def("logits_weigh", &logits_weigh, py::arg("x").noconvert(), py::arg("top"), py::arg("inverse_temperature"),
        py::arg("isa") = "", "The sum of exp((x - top) * inverse_temperature), and that of each chunk of 512");
  m.def("logits_at_least", &logits_at_least, py::arg("x").noconvert(), py::arg("threshold"), py::arg("isa") = "",
        "Positions of the finite logits that reach the threshold");
  m.def("importance_fold", &importance_fold, py::arg("average").noconvert(), py::arg("mass").noconvert(),
        py::arg("keep"), py::arg("add"), py::arg("isa") = "",
        "average (tokens,) float16 in place: average * keep + mass * add where that is positive");
  m.def("importance_heaviest", &importance_heaviest, py::arg("average").noconvert(), py::arg("norm").noconvert(),
        py::arg("isa") = "", "The sum of the 8 largest products");
  m.def("pack_block", &pack_block, py::arg("format"), py::arg("k").noconvert(), py::arg("v").noconvert(),
        "(tokens, head_dim) float32 keys and values -> the bytes of one block");
  m.def("unpack_block", &unpack_block, py::arg("format"), py::arg("block").noconvert(), py::arg("head_dim"),
        py::arg("tokens"), "The bytes of one block -> (tokens, head_dim) float32 keys and values");
}

}  // namespace inferos::bindings
