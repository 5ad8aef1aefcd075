#include "ort/step_inputs.hpp"

#include <limits>

#include "core/checked.hpp"

namespace inferos::ort {
namespace {

constexpr std::int64_t kMaxExtent = std::numeric_limits<std::int32_t>::max();

std::string text(const std::vector<std::int64_t>& dims) {
  std::string out = "[";
  for (std::size_t i = 0; i < dims.size(); ++i) out += (i ? ", " : "") + std::to_string(dims[i]);
  return out + "]";
}

[[noreturn]] void refuse(const char* input, const std::vector<std::int64_t>& dims, const std::string& wanted) {
  throw Error(ErrorCode::kShape,
              std::string("CompressedAttention: ") + input + " is " + text(dims) + ", wanted " + wanted);
}

Tensor read(Api api, const KernelContext* context, Input input) {
  Tensor tensor;
  const Value* value = nullptr;
  api.checked<ApiIndex::kContextInput>(context, static_cast<std::size_t>(input), &value);
  if (!value) return tensor;
  TypeShape* raw = nullptr;
  api.checked<ApiIndex::kGetTensorTypeAndShape>(value, &raw);
  const TypeShapeInfo info(api, raw);
  tensor.dims = info.dimensions();
  void* data = nullptr;
  api.checked<ApiIndex::kGetTensorMutableData>(const_cast<Value*>(value), &data);
  tensor.data = data;
  return tensor;
}

// onnxruntime-genai feeds a value without a tensor where the host set none.
Tensor read_handle(Api api, const KernelContext* context) {
  try {
    return read(api, context, Input::kHandle);
  } catch (const Error&) {
    throw Error(ErrorCode::kShape, "CompressedAttention: inferos_handle was not set: it has no default");
  }
}

std::size_t elements(const Tensor& tensor) {
  std::size_t n = 1;
  for (const std::int64_t dim : tensor.dims) n = checked_mul(n, checked_range(dim, 0, kMaxExtent, "tensor extent"));
  return n;
}

// Batch, S, heads and head_dim out of the shapes of query, key and value.
void read_qkv(const Attributes& attributes, StepInputs& step) {
  const auto& dims = step.query.dims;
  if (dims.size() != 3) refuse("query", dims, "3 dimensions");
  step.batch = checked_range(dims[0], 0, kMaxExtent, "query batch");
  step.sequence = checked_range(dims[1], 0, kMaxExtent, "query tokens");
  const std::size_t width = checked_range(dims[2], 1, kMaxExtent, "query width");
  step.heads = static_cast<std::size_t>(attributes.num_heads);
  step.kv_heads = static_cast<std::size_t>(attributes.kv_num_heads);
  step.packed = !step.key.data;
  if (step.packed != !step.value.data) {
    throw Error(ErrorCode::kShape, "CompressedAttention: key and value go together; one of them is absent");
  }
  const std::size_t parts = step.packed ? step.heads + 2 * step.kv_heads : step.heads;
  if (width % parts != 0) refuse("query", dims, "a last extent that " + std::to_string(parts) + " heads divide");
  step.d = width / parts;
  if (attributes.head_dim != 0 && static_cast<std::size_t>(attributes.head_dim) != step.d) {
    refuse("query", dims, "heads of " + std::to_string(attributes.head_dim));
  }
  const std::vector<std::int64_t> wanted{dims[0], dims[1], static_cast<std::int64_t>(step.kv_heads * step.d)};
  if (!step.packed && step.key.dims != wanted) refuse("key", step.key.dims, text(wanted));
  if (!step.packed && step.value.dims != wanted) refuse("value", step.value.dims, text(wanted));
}

void read_rotary(Api api, const KernelContext* context, StepInputs& step) {
  step.cosine = read(api, context, Input::kCosine);
  step.sine = read(api, context, Input::kSine);
  if (!step.cosine.data || !step.sine.data) {
    throw Error(ErrorCode::kShape, "CompressedAttention: do_rotary is 1, but cos_cache or sin_cache is absent");
  }
  const auto& dims = step.cosine.dims;
  if (dims.size() != 2) refuse("cos_cache", dims, "2 dimensions");
  if (step.sine.dims != dims) refuse("sin_cache", step.sine.dims, "cos_cache's " + text(dims));
  step.rotary_rows = checked_range(dims[0], 1, kMaxExtent, "cos_cache rows");
  step.pairs = checked_range(dims[1], 1, static_cast<std::int64_t>(step.d / 2), "cos_cache columns");
}

// Past and new tokens of each row. `lengths` are totals minus 1, as GroupQueryAttention has them.
void read_rows(std::span<const std::int32_t> lengths, std::int64_t total, std::span<const kv::Handle> handles,
               StepInputs& step) {
  const auto sequence = static_cast<std::int64_t>(step.sequence);
  step.first_prompt = total == sequence;
  if (!step.first_prompt && step.batch > 1 && sequence > 1) {
    throw Error(ErrorCode::kShape, "CompressedAttention: " + std::to_string(step.batch) + " rows of " +
                                       std::to_string(sequence) +
                                       " tokens with a past; several tokens after a past are for one row only");
  }
  for (std::size_t row = 0; row < step.batch; ++row) {
    const std::int64_t length = std::int64_t{lengths[row]} + 1;
    const std::int64_t low = step.first_prompt ? 1 : sequence;
    checked_range(length, low, total, "CompressedAttention: seqlens_k + 1");
    const std::int64_t past = step.first_prompt ? 0 : length - sequence;
    step.rows.push_back({handles[row], past, static_cast<std::size_t>(length - past)});
  }
}

void check_positions(const StepInputs& step) {
  const auto limit = static_cast<std::int64_t>(step.rotary_rows) - 1;
  for (std::size_t row = 0; row < step.batch; ++row) {
    for (std::size_t token = 0; token < step.rows[row].tokens; ++token) {
      checked_range(step.position(row, token), 0, limit, "CompressedAttention: rotary position");
    }
  }
}

}  // namespace

std::int64_t StepInputs::position(std::size_t row, std::size_t token) const noexcept {
  const auto offset = static_cast<std::int64_t>(token);
  if (positions.empty()) return rows[row].past + offset;
  // Compared, not added, where an id near the type's limit could overflow: check_positions refuses what is out of range.
  if (!first_prompt) return positions[row * sequence + token];
  return positions[0] > kMaxExtent ? positions[0] : positions[0] + offset;
}

std::span<const kv::Handle> read_handles(Api api, const KernelContext* context) {
  const Tensor handle = read_handle(api, context);
  return {static_cast<const kv::Handle*>(handle.data), handle.data ? elements(handle) : 0};
}

StepInputs read_inputs(Api api, const KernelContext* context, const Attributes& attributes) {
  StepInputs step{};
  step.query = read(api, context, Input::kQuery);
  step.key = read(api, context, Input::kKey);
  step.value = read(api, context, Input::kValue);
  read_qkv(attributes, step);
  if (step.batch == 0 || step.sequence == 0) return step;

  const Tensor lengths = read(api, context, Input::kLengths);
  if (elements(lengths) != step.batch) refuse("seqlens_k", lengths.dims, "one value per row");
  const Tensor total = read(api, context, Input::kTotal);
  if (elements(total) != 1) refuse("total_sequence_length", total.dims, "one value");
  const std::int64_t longest = *static_cast<const std::int32_t*>(total.data);
  checked_range(longest, static_cast<std::int64_t>(step.sequence), kMaxExtent,
                "CompressedAttention: total_sequence_length");
  const auto handles = read_handles(api, context);
  if (handles.size() != step.batch) {
    throw Error(ErrorCode::kShape, "CompressedAttention: " + std::to_string(handles.size()) + " handles for " +
                                       std::to_string(step.batch) + " rows");
  }
  read_rows({static_cast<const std::int32_t*>(lengths.data), step.batch}, longest, handles, step);

  if (attributes.do_rotary) {
    read_rotary(api, context, step);
    const Tensor positions = read(api, context, Input::kPositions);
    if (positions.data) {
      const std::size_t wanted = checked_mul(step.batch, step.sequence);
      if (elements(positions) != wanted) refuse("position_ids", positions.dims, "one value per token");
      step.positions = {static_cast<const std::int64_t*>(positions.data), wanted};
    }
    check_positions(step);
  }
  return step;
}

void check_layer(const kv::CacheOptions& options, const Attributes& attributes, const StepInputs& step) {
  const auto layer = checked_range(attributes.layer, 0, static_cast<std::int64_t>(options.layers.size()) - 1,
                                   "CompressedAttention: layer of this cache");
  const kv::LayerShape& shape = options.layers[layer];
  const std::int64_t window = shape.local_window < 0 ? -1 : std::int64_t{shape.local_window} + 1;
  if (shape.kv_heads == step.kv_heads && shape.head_dim == step.d && window == attributes.local_window_size) return;
  const auto describe = [](std::size_t kv_heads, std::size_t d, std::int64_t visible) {
    return std::to_string(kv_heads) + " kv heads of " + std::to_string(d) + ", window " + std::to_string(visible);
  };
  throw Error(ErrorCode::kShape, "CompressedAttention: layer " + std::to_string(layer) + " of the model has " +
                                     describe(step.kv_heads, step.d, attributes.local_window_size) + "; of the cache " +
                                     describe(shape.kv_heads, shape.head_dim, window));
}

}  // namespace inferos::ort
