#pragma once
// What one call of the op is asked to do: its inputs, every integer and shape checked against the node's attributes.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kv/registry.hpp"
#include "kv/sequence_cache.hpp"
#include "ort/ort_abi.hpp"

namespace inferos::ort {

// The op's inputs, in order. Those marked optional may be absent (an empty name in the graph).
enum class Input : std::size_t {
  kQuery = 0,      // T     [batch][S][heads * D], or packed [batch][S][(heads + 2 * kv_heads) * D]
  kKey = 1,        // T     [batch][S][kv_heads * D]    optional, with kValue
  kValue = 2,      // T     [batch][S][kv_heads * D]    optional
  kLengths = 3,    // int32 [batch]: total tokens of the row, minus 1 (seqlens_k)
  kTotal = 4,      // int32, one element: the longest row's total
  kCosine = 5,     // T     [positions][pairs]          optional; needed where do_rotary
  kSine = 6,       // T     as kCosine
  kPositions = 7,  // int64 [batch][S]                  optional
  kHandle = 8,     // int64 [batch]: each row's cache
};
inline constexpr std::size_t kInputs = 9;

struct Attributes {
  std::int64_t layer;
  std::int64_t num_heads;
  std::int64_t kv_num_heads;
  std::int64_t head_dim;  // 0 = what the inputs say
  float scale;            // 0 = 1/sqrt(D)
  bool do_rotary;
  bool rotary_interleaved;
  // Positions a query sees, its own included, -1 = all. LayerShape.local_window counts those before its own: one less.
  std::int64_t local_window_size;
  float softcap;  // 0 = none
};

// A tensor's memory and shape; `data` is null where an optional input is absent.
struct Tensor {
  const void* data = nullptr;
  std::vector<std::int64_t> dims;
};

struct RowPlan {
  kv::Handle handle;
  std::int64_t past;   // tokens the host believes are cached
  std::size_t tokens;  // new ones; beyond them, up to S, the row is padding
};

struct StepInputs {
  std::size_t batch, sequence;  // rows, tokens per row (S)
  std::size_t heads, kv_heads, d;
  bool packed;
  Tensor query, key, value;  // T
  Tensor cosine, sine;       // T, where rotary
  std::size_t pairs;         // rotary: columns of cosine
  std::size_t rotary_rows;
  bool first_prompt;                        // S == the longest row: nothing is cached yet
  std::span<const std::int64_t> positions;  // [batch * S], or empty
  std::vector<RowPlan> rows;

  // Position of a row's token as GroupQueryAttention has it: a first prompt counts from the first position id of the
  // batch, a later step uses every one of them, and without position ids it is the place in the sequence.
  std::int64_t position(std::size_t row, std::size_t token) const noexcept;
};

// The handles of a call, also where the rest of it is wrong (an error is kept on them); empty where they are unusable.
std::span<const kv::Handle> read_handles(Api api, const KernelContext* context);

// Throws Error{kShape} naming the input, its value and what would be right.
StepInputs read_inputs(Api api, const KernelContext* context, const Attributes& attributes);

// Throws Error{kShape} where the cache was made for another model.
void check_layer(const kv::CacheOptions& options, const Attributes& attributes, const StepInputs& step);

}  // namespace inferos::ort
