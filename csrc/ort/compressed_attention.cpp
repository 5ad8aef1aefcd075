#include "ort/compressed_attention.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "attention/attention.hpp"
#include "core/checked.hpp"
#include "kernels/quantize.hpp"
#include "ort/rope.hpp"

namespace inferos::ort {
namespace {

constexpr std::size_t kTileTokens = 16;         // tokens one task of the preparation handles
constexpr std::size_t kKeptScratch = 1u << 20;  // floats a thread keeps between calls; a long prompt's are given back

// Rows in f32, as the cache and the attention want them. One per thread that calls session.run.
class Scratch {
 public:
  float* take(std::size_t floats) {
    if (floats > size_) {
      memory_ = std::make_unique_for_overwrite<float[]>(floats);
      size_ = floats;
    }
    return memory_.get();
  }
  void trim() noexcept {
    if (size_ <= kKeptScratch) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  std::unique_ptr<float[]> memory_;
  std::size_t size_ = 0;
};

void load(const float* from, std::size_t n, float* to) noexcept { std::memcpy(to, from, n * sizeof(float)); }
void load(const std::uint16_t* from, std::size_t n, float* to) noexcept { kernels::convert().f16_to_f32(from, n, to); }
void store(const float* from, std::size_t n, std::uint16_t* to) noexcept { kernels::convert().f32_to_f16(from, n, to); }

// Query, keys and values of a step in f32, [row][token][head][D] each, rotated where the node asks for it.
template <class T>
struct Prepare {
  const StepInputs& step;
  const Attributes& attributes;
  float* q;
  float* k;
  float* v;

  std::size_t q_width() const noexcept { return step.heads * step.d; }
  std::size_t kv_width() const noexcept { return step.kv_heads * step.d; }
  std::size_t tiles() const noexcept { return (step.sequence + kTileTokens - 1) / kTileTokens; }

  void token(std::size_t row, std::size_t index) const noexcept {
    const std::size_t at = row * step.sequence + index;
    const T* query = static_cast<const T*>(step.query.data);
    float* q_out = q + at * q_width();
    float* k_out = k + at * kv_width();
    float* v_out = v + at * kv_width();
    if (step.packed) {
      const T* from = query + at * (q_width() + 2 * kv_width());
      load(from, q_width(), q_out);
      load(from + q_width(), kv_width(), k_out);
      load(from + q_width() + kv_width(), kv_width(), v_out);
    } else {
      load(query + at * q_width(), q_width(), q_out);
      load(static_cast<const T*>(step.key.data) + at * kv_width(), kv_width(), k_out);
      load(static_cast<const T*>(step.value.data) + at * kv_width(), kv_width(), v_out);
    }
    if (!attributes.do_rotary) return;
    float cosine[kernels::kMaxHeadDim / 2];
    float sine[kernels::kMaxHeadDim / 2];
    const std::size_t offset = static_cast<std::size_t>(step.position(row, index)) * step.pairs;
    load(static_cast<const T*>(step.cosine.data) + offset, step.pairs, cosine);
    load(static_cast<const T*>(step.sine.data) + offset, step.pairs, sine);
    rotate_heads(q_out, step.heads, step.d, cosine, sine, step.pairs, attributes.rotary_interleaved);
    rotate_heads(k_out, step.kv_heads, step.d, cosine, sine, step.pairs, attributes.rotary_interleaved);
  }

  static void tile(void* context, std::size_t i) {
    const auto& self = *static_cast<const Prepare*>(context);
    const std::size_t row = i / self.tiles();
    const std::size_t first = i % self.tiles() * kTileTokens;
    const std::size_t last = std::min(first + kTileTokens, self.step.rows[row].tokens);
    for (std::size_t index = first; index < last; ++index) self.token(row, index);
  }
};

// The sequences of a call, held until it ends.
std::vector<kv::Lease> hold(const StepInputs& step) {
  std::vector<kv::Lease> leases;
  leases.reserve(step.batch);
  for (const RowPlan& row : step.rows) leases.emplace_back(row.handle);
  return leases;
}

// Begins or joins the step of every row before any of them is written, so that a budget that is too small changes nothing.
void append(std::vector<kv::Lease>& leases, const StepInputs& step, const Attributes& attributes, const float* k,
            const float* v, Executor& executor) {
  const auto layer = static_cast<std::size_t>(attributes.layer);
  for (std::size_t row = 0; row < step.batch; ++row) {
    leases[row]->enter(layer, step.rows[row].past, static_cast<std::int64_t>(step.rows[row].tokens));
  }
  const std::size_t stride = step.sequence * step.kv_heads * step.d;
  for (std::size_t row = 0; row < step.batch; ++row) {
    leases[row]->append(layer, k + row * stride, v + row * stride, executor);
  }
}

void attend(std::vector<kv::Lease>& leases, const StepInputs& step, const Attributes& attributes, const float* q,
            float* out, Executor& executor) {
  const auto layer = static_cast<std::size_t>(attributes.layer);
  const std::size_t width = step.heads * step.d;
  std::vector<attention::Row> rows;
  rows.reserve(step.batch);
  for (std::size_t row = 0; row < step.batch; ++row) {
    const std::size_t tokens = step.rows[row].tokens;
    const std::size_t offset = row * step.sequence * width;
    rows.push_back({&*leases[row], q + offset, out + offset, tokens, nullptr});
    std::fill(out + offset + tokens * width, out + offset + step.sequence * width, 0.0f);
  }
  attention::run(rows, {layer, step.heads, attributes.scale, attributes.softcap}, executor);
}

std::int64_t integer(Api api, const KernelInfo* info, const char* name, std::int64_t absent) {
  std::int64_t value = absent;
  return api.succeeded<ApiIndex::kAttributeInt64>(info, name, &value) ? value : absent;
}

float number(Api api, const KernelInfo* info, const char* name) {
  float value = 0.0f;
  return api.succeeded<ApiIndex::kAttributeFloat>(info, name, &value) ? value : 0.0f;
}

std::string node_name(Api api, const KernelInfo* info) {
  std::size_t size = 0;
  api.succeeded<ApiIndex::kNodeName>(info, static_cast<char*>(nullptr), &size);
  if (size == 0) return {};
  std::string name(size, '\0');  // the size counts the terminating zero
  if (!api.succeeded<ApiIndex::kNodeName>(info, name.data(), &size)) return {};
  name.resize(name.find('\0') == std::string::npos ? name.size() : name.find('\0'));
  return name;
}

}  // namespace

CompressedAttention::CompressedAttention(Api api, const KernelInfo* info, ElementType type)
    : api_(api), node_(node_name(api, info)), type_(type) {
  attributes_.layer = integer(api, info, "layer", -1);
  attributes_.num_heads = integer(api, info, "num_heads", 0);
  attributes_.kv_num_heads = integer(api, info, "kv_num_heads", 0);
  attributes_.head_dim = integer(api, info, "head_dim", 0);
  attributes_.scale = number(api, info, "scale");
  attributes_.do_rotary = integer(api, info, "do_rotary", 0) != 0;
  attributes_.rotary_interleaved = integer(api, info, "rotary_interleaved", 0) != 0;
  attributes_.local_window_size = integer(api, info, "local_window_size", -1);
  attributes_.softcap = number(api, info, "softcap");
  checked_range(attributes_.layer, 0, 4095, "CompressedAttention: layer");
  checked_range(attributes_.kv_num_heads, 1, 1024, "CompressedAttention: kv_num_heads");
  checked_range(attributes_.num_heads, attributes_.kv_num_heads, 65536, "CompressedAttention: num_heads");
  checked_range(attributes_.head_dim, 0, kernels::kMaxHeadDim, "CompressedAttention: head_dim");
  if (attributes_.num_heads % attributes_.kv_num_heads != 0) {
    throw Error(ErrorCode::kShape, "CompressedAttention: num_heads " + std::to_string(attributes_.num_heads) +
                                       " is no multiple of kv_num_heads " + std::to_string(attributes_.kv_num_heads));
  }
  // A window of 0 sees no token at all: stock ONNX Runtime returns nonsense for it.
  if (attributes_.local_window_size != -1) {
    checked_range(attributes_.local_window_size, 1, 1 << 30, "CompressedAttention: local_window_size");
  }
}

template <class T>
void CompressedAttention::run(KernelContext* context) const {
  const StepInputs step = read_inputs(api_, context, attributes_);
  const std::size_t width = step.heads * step.d;
  const std::int64_t dims[3] = {step.query.dims[0], step.query.dims[1], static_cast<std::int64_t>(width)};
  Value* output = nullptr;
  api_.checked<ApiIndex::kContextOutput>(context, std::size_t{0}, static_cast<const std::int64_t*>(dims),
                                         std::size_t{3}, &output);
  if (step.batch == 0 || step.sequence == 0) return;
  void* output_data = nullptr;
  api_.checked<ApiIndex::kGetTensorMutableData>(output, &output_data);

  std::vector<kv::Lease> leases = hold(step);
  for (kv::Lease& lease : leases) check_layer(lease->options(), attributes_, step);

  constexpr bool kSame = std::is_same_v<T, float>;
  const std::size_t tokens = checked_mul(step.batch, step.sequence);
  const std::size_t q_floats = checked_mul(tokens, width);
  const std::size_t kv_floats = checked_mul(tokens, step.kv_heads * step.d);
  thread_local Scratch scratch;
  float* q = scratch.take(checked_add(q_floats * (kSame ? 1 : 2), 2 * kv_floats));
  float* out = kSame ? static_cast<float*>(output_data) : q + q_floats + 2 * kv_floats;
  Prepare<T> prepare{step, attributes_, q, q + q_floats, q + q_floats + kv_floats};
  PoolExecutor executor(api_, context);
  executor.parallel_for(step.batch * prepare.tiles(), &Prepare<T>::tile, &prepare);

  append(leases, step, attributes_, prepare.k, prepare.v, executor);
  attend(leases, step, attributes_, prepare.q, out, executor);
  if constexpr (!kSame) store(out, q_floats, static_cast<T*>(output_data));
  scratch.trim();
}

Status* CompressedAttention::compute(KernelContext* context) const noexcept {
  const auto fail = [&](const Error& error) noexcept -> Status* {
    try {
      const Error named(error.code(),
                        node_.empty() ? error.what() : std::string(error.what()) + " (node " + node_ + ")");
      for (const kv::Handle handle : read_handles(api_, context)) kv::keep_error(handle, named);
      return api_.status(named.what());
    } catch (const std::exception&) {
      return api_.status(error.what());
    }
  };
  try {
    if (type_ == ElementType::kFloat) {
      run<float>(context);
    } else {
      run<std::uint16_t>(context);
    }
    return nullptr;
  } catch (const Error& error) {
    return fail(error);
  } catch (const std::bad_alloc&) {
    return api_.status("CompressedAttention: out of memory");
  } catch (const std::exception& error) {
    return api_.status(error.what());
  }
}

}  // namespace inferos::ort
