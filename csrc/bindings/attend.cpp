// _core.kernels: the attention kernels of every ISA, for tests and hosts that keep their own blocks.

#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include <pybind11/stl.h>

#include "bindings/bindings.hpp"
#include "core/error.hpp"
#include "kernels/attend.hpp"

namespace inferos::bindings {
namespace {

using kernels::Attend;
using kernels::BlockView;
using kernels::Format;
using kernels::kBlockTokens;

using Floats = py::array_t<float, py::array::c_style>;
using Halves = py::array_t<std::uint16_t, py::array::c_style>;
using Bytes = py::array_t<std::uint8_t, py::array::c_style>;
using Ranges = py::array_t<std::int32_t, py::array::c_style>;
using BlockTuple = std::tuple<Bytes, std::int32_t, int, int, int>;  // record, start, begin, end, capacity

[[noreturn]] void refuse(const std::string& what) { throw Error(ErrorCode::kShape, what); }

template <class Sizes>
std::string joined(const Sizes& sizes) {
  std::ostringstream text;
  for (const auto size : sizes) text << (text.tellp() == 0 ? "" : ", ") << size;
  return text.str();
}

void expect(const py::array& array, const char* name, const std::vector<std::size_t>& shape) {
  const std::vector<std::size_t> got(array.shape(), array.shape() + array.ndim());
  if (got != shape) refuse(std::string(name) + ": shape (" + joined(got) + "), wanted (" + joined(shape) + ")");
}

Format checked_format(int format) {
  if (format < 0 || format >= static_cast<int>(kernels::kFormats)) {
    refuse("format: " + std::to_string(format) + " is not within 0..3");
  }
  return static_cast<Format>(format);
}

std::size_t rows_of(const Floats& q, const char* name) {
  if (q.ndim() != 2 || q.shape(0) == 0) refuse(std::string(name) + ": wanted a non-empty array of 2 dimensions");
  const auto d = static_cast<std::size_t>(q.shape(1));
  if (!kernels::valid_head_dim(d)) refuse("head_dim: " + std::to_string(d) + " is not a multiple of 16 within 16..256");
  return static_cast<std::size_t>(q.shape(0));
}

BlockView view(Format format, const BlockTuple& block, std::size_t d) {
  const auto& [record, start, begin, end, capacity] = block;
  const bool f16 = format == Format::kF16;
  if (f16 ? capacity < 16 || capacity > 64 || capacity % 16 != 0 : capacity != 64) {
    refuse("block capacity: " + std::to_string(capacity));
  }
  if (begin < 0 || begin > end || end > capacity) {
    refuse("block tokens: " + std::to_string(begin) + ".." + std::to_string(end) + " of " + std::to_string(capacity));
  }
  if (start < 0 || start > std::numeric_limits<std::int32_t>::max() - 64)
    refuse("block start: " + std::to_string(start));
  const std::size_t bytes =
      f16 ? kernels::f16_block_bytes(d, static_cast<std::size_t>(capacity)) : kernels::block_bytes(format, d);
  expect(record, "block", {bytes});
  return {reinterpret_cast<const std::byte*>(record.data()), start, static_cast<std::uint16_t>(begin),
          static_cast<std::uint16_t>(end), static_cast<std::uint16_t>(capacity)};
}

void decode(const Attend& kernel, const Floats& q, int format, const std::vector<BlockTuple>& blocks,
            std::pair<std::int32_t, std::int32_t> visible, float scale, float softcap, Floats& o, Floats& m, Floats& l,
            std::optional<Floats> logits, float skip_below, std::optional<Halves> seen_p,
            std::optional<Floats> seen_m) {
  const std::size_t group = rows_of(q, "q");
  const auto d = static_cast<std::size_t>(q.shape(1));
  expect(o, "o", {group, d});
  expect(m, "m", {group});
  expect(l, "l", {group});
  if (logits) expect(*logits, "logits", {blocks.size(), group, kBlockTokens});
  if (seen_p.has_value() != seen_m.has_value()) refuse("seen_p and seen_m: both or neither");
  if (seen_p) expect(*seen_p, "seen_p", {blocks.size(), group, kBlockTokens});
  if (seen_m) expect(*seen_m, "seen_m", {blocks.size(), group});
  std::vector<BlockView> views;
  views.reserve(blocks.size());
  for (const BlockTuple& block : blocks) views.push_back(view(checked_format(format), block, d));
  const kernels::DecodeTask task{.q = q.data(),
                                 .group = group,
                                 .d = d,
                                 .scale = scale,
                                 .softcap = softcap,
                                 .skip_below = skip_below,
                                 .visible = {visible.first, visible.second},
                                 .format = checked_format(format),
                                 .blocks = views.data(),
                                 .count = views.size(),
                                 .near = false,
                                 .then = nullptr,
                                 .o = o.mutable_data(),
                                 .m = m.mutable_data(),
                                 .l = l.mutable_data(),
                                 .logits = logits ? logits->mutable_data() : nullptr,
                                 .seen_p = seen_p ? seen_p->mutable_data() : nullptr,
                                 .seen_m = seen_m ? seen_m->mutable_data() : nullptr};
  const py::gil_scoped_release unlocked;
  kernel.decode(task);
}

std::pair<Floats, Floats> expand(const Attend& kernel, int format, const BlockTuple& block, std::size_t d) {
  if (!kernels::valid_head_dim(d)) refuse("head_dim: " + std::to_string(d) + " is not a multiple of 16 within 16..256");
  const BlockView seen = view(checked_format(format), block, d);
  Floats k({d, kBlockTokens});
  Floats v({kBlockTokens, d});
  float* const k_data = k.mutable_data();
  float* const v_data = v.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    kernel.expand(static_cast<Format>(format), seen, d, k_data, v_data);
  }
  return {k, v};
}

void prefill(const Attend& kernel, const Floats& q, const Floats& k, const Floats& v, std::int32_t start, int begin,
             int end, const Ranges& visible, float scale, float softcap, Floats& o, Floats& m, Floats& l) {
  const std::size_t rows = rows_of(q, "q");
  const auto d = static_cast<std::size_t>(q.shape(1));
  expect(k, "k", {d, kBlockTokens});
  expect(v, "v", {kBlockTokens, d});
  expect(visible, "visible", {rows, 2});
  expect(o, "o", {rows, d});
  expect(m, "m", {rows});
  expect(l, "l", {rows});
  if (begin < 0 || begin > end || end > static_cast<int>(kBlockTokens))
    refuse("prefill: begin and end must be within 0..64");
  std::vector<kernels::Visible> ranges(rows);
  for (std::size_t i = 0; i < rows; ++i) ranges[i] = {visible.data()[2 * i], visible.data()[2 * i + 1]};
  const kernels::PrefillTile tile{.q = q.data(),
                                  .rows = rows,
                                  .d = d,
                                  .scale = scale,
                                  .softcap = softcap,
                                  .k = k.data(),
                                  .v = v.data(),
                                  .start = start,
                                  .begin = static_cast<std::uint16_t>(begin),
                                  .end = static_cast<std::uint16_t>(end),
                                  .visible = ranges.data(),
                                  .o = o.mutable_data(),
                                  .m = m.mutable_data(),
                                  .l = l.mutable_data()};
  const py::gil_scoped_release unlocked;
  kernel.prefill(tile);
}

Floats mass(const Attend& kernel, const Halves& seen_p, const Floats& seen_m, const Floats& top, const Floats& weight) {
  const auto group = static_cast<std::size_t>(top.size());
  expect(top, "top", {group});
  expect(weight, "weight", {group});
  expect(seen_p, "seen_p", {group, kBlockTokens});
  expect(seen_m, "seen_m", {group});
  Floats sum(static_cast<py::ssize_t>(kBlockTokens));
  float* const to = sum.mutable_data();
  const std::uint16_t* const from = seen_p.data();
  const float* const own = seen_m.data();
  const float* const tops = top.data();
  const float* const weights = weight.data();
  const py::gil_scoped_release unlocked;
  kernel.mass(from, own, group, tops, weights, to);
  return sum;
}

}  // namespace

void add_attend(py::module_& m) {
  py::class_<Attend>(m, "Attend", "Attention kernels of one ISA; csrc/kernels/attend.hpp fixes what they compute.")
      .def_property_readonly("isa", [](const Attend& kernel) { return isa_name(kernel.isa); })
      .def("decode", &decode, py::arg("q").noconvert(), py::arg("format"), py::arg("blocks").noconvert(),
           py::arg("visible"), py::arg("scale"), py::arg("softcap"), py::arg("o").noconvert(), py::arg("m").noconvert(),
           py::arg("l").noconvert(), py::arg("logits").noconvert() = py::none(), py::arg("skip_below") = 0.0F,
           py::arg("seen_p").noconvert() = py::none(), py::arg("seen_m").noconvert() = py::none(),
           "One query token over blocks of one format; o, m and l are read and updated.")
      .def("expand", &expand, py::arg("format"), py::arg("block").noconvert(), py::arg("head_dim"),
           "One block as f32 tiles: k (head_dim, 64), v (64, head_dim).")
      .def("prefill", &prefill, py::arg("q").noconvert(), py::arg("k").noconvert(), py::arg("v").noconvert(),
           py::arg("start"), py::arg("begin"), py::arg("end"), py::arg("visible").noconvert(), py::arg("scale"),
           py::arg("softcap"), py::arg("o").noconvert(), py::arg("m").noconvert(), py::arg("l").noconvert(),
           "Many query rows over one expanded block; o, m and l are read and updated.")
      .def("mass", &mass, py::arg("seen_p").noconvert(), py::arg("seen_m").noconvert(), py::arg("top").noconvert(),
           py::arg("weight").noconvert(),
           "(group, 64) bits of fp16 and (group,) -> (64,): the sum over the group of weight * exp(seen_m - top) * p.");
  m.def(
      "attend_runnable",
      [] {
        py::list all;
        for (const Attend& kernel : kernels::attend_runnable())
          all.append(py::cast(&kernel, py::return_value_policy::reference));
        return all;
      },
      "Attention kernels this CPU can run, scalar first.");
}

}  // namespace inferos::bindings
