// _core.Arena, the library and its threads, and _core.cache: sequences by handle. Validate, lease, view, unlock, call.

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <pybind11/stl.h>

#include "attention/attention.hpp"
#include "bindings/bindings.hpp"
#include "core/arena.hpp"
#include "core/instances.hpp"
#include "core/thread_pool.hpp"
#include "kernels/quantize.hpp"
#include "kv/registry.hpp"

namespace inferos::bindings {

struct Half {  // bits of one IEEE binary16, numpy's float16
  std::uint16_t bits;
};

}  // namespace inferos::bindings

template <>
struct pybind11::detail::npy_format_descriptor<inferos::bindings::Half> {
  static constexpr auto name = const_name("numpy.float16");
  static pybind11::dtype dtype() { return pybind11::dtype("e"); }
};

namespace inferos::bindings {
namespace {

using kernels::Format;
using kv::Handle;
using kv::Lease;
using kv::SequenceCache;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

constexpr std::array<const char*, kernels::kFormats> kFormatNames{"f16", "int8", "k8v4", "int4"};
constexpr std::uint8_t kNotHeld = 255;

constexpr std::array<const char*, 4> kLevelNames{"L0", "L1", "L2", "L3"};
constexpr std::array<const char*, 2> kEvictionNames{"never", "pressure"};
constexpr std::array<const char*, 3> kOverflowNames{"error", "stop", "evict"};

// The enumerator of that name: they are numbered as the names are.
template <class Enum, std::size_t N>
Enum choice(const char* what, const std::string& name, const std::array<const char*, N>& names) {
  std::string known;
  for (std::size_t i = 0; i < N; ++i) {
    if (name == names[i]) return static_cast<Enum>(i);
    known += (i == 0 ? "" : ", ") + std::string(names[i]);
  }
  throw Error(ErrorCode::kConfig, std::string(what) + ": '" + name + "' is not one of " + known);
}

Format format_of(const std::string& name) { return choice<Format>("format", name, kFormatNames); }

// Thresholds (l1, l2, l3), gamma, eviction, overflow, max_levels, whether scores are the caller's, whether keys are checked.
using PolicyArguments =
    std::tuple<std::array<double, 3>, double, std::string, std::string, std::vector<std::string>, bool, bool>;

kv::Policy policy_of(const PolicyArguments& from) {
  const auto& [levels, gamma, eviction, overflow, max_levels, external, check_keys] = from;
  kv::Policy policy{{levels[0], levels[1], levels[2]},
                    gamma,
                    choice<kv::Eviction>("eviction", eviction, kEvictionNames),
                    choice<kv::Overflow>("overflow", overflow, kOverflowNames),
                    external,
                    check_keys,
                    {}};
  for (const std::string& level : max_levels) {
    policy.max_levels.push_back(choice<kv::Level>("max_levels", level, kLevelNames));
  }
  return policy;
}

std::string text(const py::array& array) {
  std::string out;
  for (py::ssize_t i = 0; i < array.ndim(); ++i) out += (i == 0 ? "" : ", ") + std::to_string(array.shape(i));
  return "(" + out + ")";
}

// `rows` a 3-dimensional array whose last two sizes are given (heads 0 = any); returns the first.
std::size_t rows_of(const char* name, const py::array& rows, std::size_t heads, std::size_t head_dim) {
  if (rows.ndim() != 3 || rows.shape(0) < 1 || (heads != 0 && static_cast<std::size_t>(rows.shape(1)) != heads) ||
      static_cast<std::size_t>(rows.shape(2)) != head_dim) {
    throw Error(ErrorCode::kShape, std::string(name) + ": shape " + text(rows) + ", wanted (tokens, " +
                                       (heads == 0 ? "heads" : std::to_string(heads)) + ", " +
                                       std::to_string(head_dim) + ")");
  }
  return static_cast<std::size_t>(rows.shape(0));
}

const kv::LayerShape& shape_of(const SequenceCache& cache, std::size_t layer) {
  const auto& layers = cache.options().layers;
  if (layer >= layers.size()) {
    throw Error(ErrorCode::kShape, "layer " + std::to_string(layer) + " of " + std::to_string(layers.size()));
  }
  return layers[layer];
}

std::size_t size_of(const py::array& array) { return static_cast<std::size_t>(array.size()); }

const float* widen(const float* values, std::size_t /*count*/, std::vector<float>& /*memory*/) { return values; }
const float* widen(const Half* values, std::size_t count, std::vector<float>& memory) {
  memory.resize(count);
  kernels::convert().f16_to_f32(&values->bits, count, memory.data());
  return memory.data();
}

// The core checks the range of an option; here only what its type cannot say.
std::size_t option(std::int64_t value, const char* name) {
  if (value < 0) throw Error(ErrorCode::kConfig, std::string(name) + ": " + std::to_string(value) + " is negative");
  return static_cast<std::size_t>(value);
}

Handle open(const std::vector<std::tuple<std::int64_t, std::int64_t, std::int32_t>>& layers,
            const std::vector<std::string>& formats, std::int64_t recent_window, std::int64_t sink_tokens,
            std::int64_t max_tokens, const std::shared_ptr<Arena>& arena,
            const std::optional<PolicyArguments>& policy) {
  kv::CacheOptions options;
  for (const auto& [kv_heads, head_dim, local_window] : layers) {
    options.layers.push_back({option(kv_heads, "kv_heads"), option(head_dim, "head_dim"), local_window});
  }
  for (const std::string& name : formats) options.formats.push_back(format_of(name));
  options.recent_window = option(recent_window, "recent_window");
  options.sink_tokens = option(sink_tokens, "sink_tokens");
  options.max_tokens = option(max_tokens, "max_tokens");
  if (policy) options.policy = policy_of(*policy);
  return kv::open_sequence(std::make_unique<SequenceCache>(std::move(options), arena));
}

template <class T>
void append(Handle handle, std::size_t layer, const Array<T>& k, const Array<T>& v) {
  Lease lease(handle);
  const kv::LayerShape& shape = shape_of(*lease, layer);
  const auto pending = static_cast<std::size_t>(lease->pending());
  for (const auto& [name, rows] : {std::pair{"append: k", &k}, std::pair{"append: v", &v}}) {
    const std::size_t tokens = rows_of(name, *rows, shape.kv_heads, shape.head_dim);
    if (pending != 0 && tokens != pending) {
      throw Error(ErrorCode::kShape, std::string(name) + ": " + std::to_string(tokens) + " tokens, the step has " +
                                         std::to_string(pending));
    }
  }
  const T* const k_data = k.data();
  const T* const v_data = v.data();
  const std::size_t count = size_of(k);
  const py::gil_scoped_release unlocked;
  std::vector<float> k_wide;
  std::vector<float> v_wide;
  lease->append(layer, widen(k_data, count, k_wide), widen(v_data, count, v_wide), ThreadPool::process());
}

void narrow(const float* from, std::size_t count, Half* to) {
  kernels::convert().f32_to_f16_saturate(from, count, &to->bits);
}

// Attention of the newest q.shape[0] tokens: (out, mass), mass None unless asked for. Feeds the importance scores of `auto`.
template <class T>
std::pair<Array<T>, py::object> attend(Handle handle, std::size_t layer, const Array<T>& q, float scale, float softcap,
                                       bool mass) {
  Lease lease(handle);
  const kv::LayerShape& shape = shape_of(*lease, layer);
  const std::size_t tokens = rows_of("attend: q", q, 0, shape.head_dim);
  const auto heads = static_cast<std::size_t>(q.shape(1));
  Array<T> out({tokens, heads, shape.head_dim});
  const auto visible = static_cast<std::size_t>(lease->visible_length(layer));
  Array<float> received = mass ? Array<float>({shape.kv_heads, visible}) : Array<float>();
  const T* const q_data = q.data();
  T* const out_data = out.mutable_data();
  float* const returned_mass = mass ? received.mutable_data() : nullptr;
  const std::size_t count = size_of(q);
  {
    const py::gil_scoped_release unlocked;
    std::vector<float> q_wide;
    std::vector<float> out_wide(std::is_same_v<T, float> ? 0 : count);
    float* result = out_wide.data();
    if constexpr (std::is_same_v<T, float>) result = out_data;
    const attention::Row row{&*lease, widen(q_data, count, q_wide), result, tokens, returned_mass};
    attention::run({&row, 1}, {layer, heads, scale, softcap}, ThreadPool::process());
    if constexpr (!std::is_same_v<T, float>) narrow(result, count, out_data);
  }
  return {std::move(out), mass ? py::object(std::move(received)) : py::none()};
}

std::tuple<Array<float>, Array<float>, std::string> read(Handle handle, std::size_t layer, std::size_t head,
                                                         std::int64_t position) {
  const Lease lease(handle);
  const std::size_t d = shape_of(*lease, layer).head_dim;
  Array<float> k(static_cast<py::ssize_t>(d));
  Array<float> v(static_cast<py::ssize_t>(d));
  Format format = Format::kF16;
  lease->read(layer, head, position, k.mutable_data(), v.mutable_data(), &format);
  return {std::move(k), std::move(v), kFormatNames[static_cast<std::size_t>(format)]};
}

// The format of every committed position, 255 where it is not held any more.
Array<std::uint8_t> formats(Handle handle, std::size_t layer, std::size_t head) {
  const Lease lease(handle);
  if (head >= shape_of(*lease, layer).kv_heads) {
    throw Error(ErrorCode::kShape, "formats: head " + std::to_string(head) + " of layer " + std::to_string(layer));
  }
  Array<std::uint8_t> held(static_cast<py::ssize_t>(lease->visible_length(layer)));
  std::uint8_t* const data = held.mutable_data();
  std::fill_n(data, held.size(), kNotHeld);
  const kv::HeadStreams& streams = lease->streams(layer)[head];
  for (std::size_t f = 0; f < kernels::kFormats; ++f) {
    for (const kv::BlockView& view : streams.by_format[f]) {
      std::fill(data + view.start + view.begin, data + view.start + view.end, static_cast<std::uint8_t>(f));
    }
  }
  return held;
}

// Importance of every block of the grid, NaN where it is not measured.
Array<double> scores(Handle handle, std::size_t layer, std::size_t head) {
  const Lease lease(handle);
  Array<double> values(static_cast<py::ssize_t>(lease->grid_blocks(layer)));
  double* const data = values.mutable_data();
  for (std::size_t i = 0; i < size_of(values); ++i) {
    data[i] = lease->score(layer, head, i);
  }
  return values;
}

void set_policy(Handle handle, const PolicyArguments& policy, const std::vector<std::string>& formats,
                std::int64_t recent_window) {
  std::vector<Format> narrowest;
  narrowest.reserve(formats.size());
  for (const std::string& name : formats) narrowest.push_back(format_of(name));
  Lease(handle)->set_policy(policy_of(policy), std::move(narrowest), option(recent_window, "recent_window"));
}

void set_scores(Handle handle, std::size_t layer, const Array<double>& scores) {
  Lease lease(handle);
  const std::size_t heads = shape_of(*lease, layer).kv_heads;
  const std::size_t blocks = lease->grid_blocks(layer);
  if (scores.ndim() != 2 || static_cast<std::size_t>(scores.shape(0)) != heads ||
      static_cast<std::size_t>(scores.shape(1)) != blocks) {
    throw Error(ErrorCode::kShape, "set_scores: shape " + text(scores) + ", wanted (" + std::to_string(heads) + ", " +
                                       std::to_string(blocks) + ")");
  }
  lease->set_scores(layer, {scores.data(), size_of(scores)});
}

template <class T>
Array<T> copied(const std::vector<T>& values) {
  return Array<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// Position, mass, value norm, key norm, key similarity.
py::tuple token_statistics(Handle handle, std::size_t layer, std::size_t head) {
  kv::TokenStatistics found;
  {
    const py::gil_scoped_release unlocked;
    found = Lease(handle)->token_statistics(layer, head);
  }
  return py::make_tuple(copied(found.position), copied(found.mass), copied(found.value_norm), copied(found.key_norm),
                        copied(found.key_similarity));
}

// (blocks, 2): the first position of each block of the grid, and one past its last.
Array<std::int64_t> block_spans(Handle handle, std::size_t layer) {
  const Lease lease(handle);
  const std::size_t blocks = lease->grid_blocks(layer);
  Array<std::int64_t> spans({blocks, std::size_t{2}});
  for (std::size_t i = 0; i < blocks; ++i) {
    std::tie(spans.mutable_at(i, 0), spans.mutable_at(i, 1)) = lease->block_span(layer, i);
  }
  return spans;
}

// By format: blocks, and the means of their normalised squared errors of K and V, 0 where there is none.
py::dict demotion_errors(const SequenceCache& cache) {
  const auto errors = cache.demotion_errors();
  py::dict named;
  for (std::size_t f = 0; f < errors.size(); ++f) {
    if (errors[f].blocks == 0) continue;
    const auto blocks = static_cast<double>(errors[f].blocks);
    named[kFormatNames[f]] = py::make_tuple(errors[f].blocks, errors[f].k / blocks, errors[f].v / blocks);
  }
  return named;
}

py::dict by_name(const std::array<std::size_t, kernels::kFormats>& counts) {
  py::dict named;
  for (std::size_t f = 0; f < counts.size(); ++f) named[kFormatNames[f]] = counts[f];
  return named;
}

py::dict sequence_stats(Handle handle) {
  const Lease lease(handle);
  const kv::TierBytes tiers = lease->tier_bytes();
  py::dict stats;
  stats["tokens"] = lease->length();
  stats["blocks"] = by_name(tiers.blocks);
  stats["bytes_by_format"] = by_name(tiers.bytes);
  stats["token_heads"] = by_name(tiers.tokens);
  stats["elements"] = tiers.elements;
  stats["shared_bytes"] = tiers.shared_bytes;
  stats["score_bytes"] = tiers.score_bytes;
  stats["evicted_token_heads"] = tiers.evicted;
  stats["evicted_mass"] = lease->evicted_mass();
  stats["demotion_error"] = demotion_errors(*lease);
  return stats;
}

py::dict arena_stats(const Arena& arena) {
  const ArenaStats from = arena.stats();
  py::dict by_tag;
  constexpr std::array<const char*, kArenaTags> kTagNames{"f16", "int8", "k8v4", "int4", "scores"};
  for (std::size_t t = 0; t < kArenaTags; ++t) by_tag[kTagNames[t]] = from.used_by_tag[t];
  py::dict stats;
  stats["budget_bytes"] = from.budget_bytes;
  stats["reserved_bytes"] = from.reserved_bytes;
  stats["reserved_high_water_bytes"] = from.reserved_high_water_bytes;
  stats["used_bytes"] = from.used_bytes;
  stats["used_high_water_bytes"] = from.used_high_water_bytes;
  stats["used_by_purpose"] = by_tag;
  stats["live_blocks"] = from.live_blocks;
  stats["slabs"] = from.slabs;
  stats["huge_slabs"] = from.huge_slabs;
  return stats;
}

// A block for tests and hosts that keep their own: released with the object.
class ArenaBlock {
 public:
  ArenaBlock(std::shared_ptr<Arena> arena, std::size_t bytes)
      : arena_(std::move(arena)), bytes_(bytes), data_(arena_->allocate(bytes, ArenaTag::kF16)) {}
  ~ArenaBlock() { release(); }
  ArenaBlock(const ArenaBlock&) = delete;
  ArenaBlock& operator=(const ArenaBlock&) = delete;

  void release() noexcept { arena_->release(std::exchange(data_, nullptr), bytes_, ArenaTag::kF16); }
  py::memoryview view() const {
    if (data_ == nullptr) throw Error(ErrorCode::kClosed, "ArenaBlock: released");
    return py::memoryview::from_memory(data_, static_cast<py::ssize_t>(bytes_));
  }
  std::uintptr_t address() const noexcept { return reinterpret_cast<std::uintptr_t>(data_); }

 private:
  std::shared_ptr<Arena> arena_;
  std::size_t bytes_;
  std::byte* data_;
};

void add_arena(py::module_& m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<Arena, std::shared_ptr<Arena>>(m, "Arena", "Budgeted memory for KV blocks. Thread-safe.")
      .def(py::init([](std::int64_t budget_bytes, bool huge_pages) {
             return std::make_shared<Arena>(option(budget_bytes, "budget_bytes"), huge_pages);
           }),
           py::arg("budget_bytes") = 0, py::arg("huge_pages") = true)
      .def("stats", &arena_stats)
      .def(
          "set_budget",
          [](Arena& arena, std::int64_t budget_bytes) {
            return arena.set_budget(option(budget_bytes, "budget_bytes"));
          },
          py::arg("budget_bytes"), "Another budget, but not less than what is reserved; the one in force.")
      .def(
          "fail_after", [](Arena& arena, std::int64_t n) { arena.fail_after(option(n, "n")); }, py::arg("n"),
          "Test seam: the n-th allocation from now is refused; 0 switches it off.");
  py::class_<ArenaBlock>(m, "ArenaBlock", "One block of an arena, released with the object.")
      .def(py::init([](std::shared_ptr<Arena> arena, std::int64_t bytes) {
             return std::make_unique<ArenaBlock>(std::move(arena), option(bytes, "bytes"));
           }),
           py::arg("arena"), py::arg("bytes"))
      .def("release", &ArenaBlock::release, Unlocked())
      .def("view", &ArenaBlock::view, py::keep_alive<0, 1>())
      .def_property_readonly("address", &ArenaBlock::address);
}

template <class T>
void add_step(py::module_& m) {
  m.def("append", &append<T>, py::arg("handle"), py::arg("layer"), py::arg("k").noconvert(), py::arg("v").noconvert(),
        "k, v: (tokens, kv_heads, head_dim) of the open step");
  m.def("attend", &attend<T>, py::arg("handle"), py::arg("layer"), py::arg("q").noconvert(), py::arg("scale") = 0.0F,
        py::arg("softcap") = 0.0F, py::arg("mass") = false,
        "q: (tokens, heads, head_dim) -> ((tokens, heads, head_dim), None or (kv_heads, visible tokens))");
}

void add_process(py::module_& m) {
  m.def("library_file", &own_file);
  m.attr("MAX_THREADS") = kMaxThreads;
  m.def("get_num_threads", [] { return ThreadPool::process().concurrency(); });
  m.def("set_num_threads", [](std::int64_t threads) { ThreadPool::process().resize(threads); }, py::arg("threads"));
}

}  // namespace

void add_cache(py::module_& parent) {
  add_arena(parent);
  add_process(parent);
  py::module_ m =
      parent.def_submodule("cache", "Sequences by handle. One thread at a time uses a sequence: BusyError.");
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("open", &open, py::arg("layers"), py::arg("formats"), py::arg("recent_window"), py::arg("sink_tokens"),
        py::arg("max_tokens"), py::arg("arena"), py::arg("policy") = py::none(),
        "layers: (kv_heads, head_dim, local_window) each; policy: None or ((l1, l2, l3), gamma, eviction, overflow, "
        "max_levels, external scores, check keys) -> handle");
  m.def("close", &kv::close_sequence, py::arg("handle"), Unlocked(),
        "Waits for a call in flight, then frees the sequence.");
  m.def("abandon", &kv::abandon, py::arg("handle"), Unlocked(),
        "Drops the open step; the new handle. The old one is refused.");
  m.def("open_sequences", &kv::open_sequences);
  m.def("fork", [](Handle handle) { return kv::open_sequence(Lease(handle)->fork()); }, py::arg("handle"), Unlocked());
  m.def("length", [](Handle handle) { return Lease(handle)->length(); }, py::arg("handle"));
  m.def("pending", [](Handle handle) { return Lease(handle)->pending(); }, py::arg("handle"));
  m.def("kept_from", [](Handle handle) { return Lease(handle)->kept_from(); }, py::arg("handle"));
  m.def("rewind_floor", [](Handle handle) { return Lease(handle)->rewind_floor(); }, py::arg("handle"));
  m.def(
      "enter",
      [](Handle handle, std::size_t layer, std::int64_t past, std::int64_t tokens) {
        Lease(handle)->enter(layer, past, tokens);
      },
      py::arg("handle"), py::arg("layer"), py::arg("past"), py::arg("tokens"), Unlocked());
  m.def(
      "begin", [](Handle handle, std::int64_t tokens) { Lease(handle)->begin(tokens); }, py::arg("handle"),
      py::arg("tokens"), Unlocked());
  add_step<float>(m);
  add_step<Half>(m);
  m.def("commit", [](Handle handle) { Lease(handle)->commit(); }, py::arg("handle"), Unlocked());
  m.def("rollback", [](Handle handle) { Lease(handle)->rollback(); }, py::arg("handle"), Unlocked());
  m.def(
      "rewind", [](Handle handle, std::int64_t length) { Lease(handle)->rewind(length); }, py::arg("handle"),
      py::arg("length"), Unlocked());
  m.def("clear", [](Handle handle) { Lease(handle)->clear(); }, py::arg("handle"), Unlocked());
  m.def(
      "demote",
      [](Handle handle, std::size_t layer, std::size_t head, std::size_t index, const std::string& format) {
        return Lease(handle)->demote(layer, head, index, format_of(format));
      },
      py::arg("handle"), py::arg("layer"), py::arg("head"), py::arg("index"), py::arg("format"), Unlocked());
  m.def(
      "evict",
      [](Handle handle, std::size_t layer, std::size_t head, std::size_t index) {
        return Lease(handle)->evict(layer, head, index);
      },
      py::arg("handle"), py::arg("layer"), py::arg("head"), py::arg("index"), Unlocked());
  m.def(
      "grid_blocks", [](Handle handle, std::size_t layer) { return Lease(handle)->grid_blocks(layer); },
      py::arg("handle"), py::arg("layer"));
  m.def("read", &read, py::arg("handle"), py::arg("layer"), py::arg("head"), py::arg("position"));
  m.def("scores", &scores, py::arg("handle"), py::arg("layer"), py::arg("head"));
  m.def("formats", &formats, py::arg("handle"), py::arg("layer"), py::arg("head"));
  m.def("stats", &sequence_stats, py::arg("handle"));
  m.def("set_policy", &set_policy, py::arg("handle"), py::arg("policy"), py::arg("formats"), py::arg("recent_window"));
  m.def("set_scores", &set_scores, py::arg("handle"), py::arg("layer"), py::arg("scores").noconvert(),
        "scores: (kv_heads, blocks) float64, NaN = unknown");
  m.def(
      "review_due", [](Handle handle, std::size_t layer) { return Lease(handle)->review_due(layer); },
      py::arg("handle"), py::arg("layer"));
  m.def("token_statistics", &token_statistics, py::arg("handle"), py::arg("layer"), py::arg("head"),
        "(tokens,) each: position, mass, value norm, key norm, key similarity");
  m.def("block_spans", &block_spans, py::arg("handle"), py::arg("layer"));
  m.def(
      "narrowest",
      [](Handle handle, std::size_t layer) {
        return kFormatNames[static_cast<std::size_t>(Lease(handle)->narrowest(layer))];
      },
      py::arg("handle"), py::arg("layer"));
  m.def(
      "take_error",
      [](Handle handle) -> py::object {
        const std::optional<Error> error = kv::take_error(handle);
        return error ? error_object(*error) : py::none();
      },
      py::arg("handle"));
}

}  // namespace inferos::bindings
