// The functions of inferos.h: check, lease, call; errors become a status and a text of the thread.

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "attention/attention.hpp"
#include "capi/inferos.h"
#include "core/arena.hpp"
#include "core/error.hpp"
#include "core/thread_pool.hpp"
#include "kv/registry.hpp"

struct inferos_arena {
  std::shared_ptr<inferos::Arena> arena;
};

namespace {

using inferos::Error;
using inferos::ErrorCode;
using inferos::kernels::Format;
using inferos::kv::Lease;

static_assert(INFEROS_FORMATS == inferos::kernels::kFormats);
static_assert(INFEROS_EVICT_PRESSURE == static_cast<int>(inferos::kv::Eviction::kPressure));
static_assert(INFEROS_OVERFLOW_EVICT == static_cast<int>(inferos::kv::Overflow::kEvict));

constexpr std::int64_t kMaxHeads = 65536;
constexpr std::size_t kMaxLayers = 4096;

// A fixed array: noting an error cannot fail for want of memory.
thread_local std::array<char, 512> last_error{};

inferos_status fail(inferos_status status, const char* what) noexcept {
  std::size_t length = 0;
  while (what[length] != '\0' && length + 1 < last_error.size()) ++length;
  std::copy_n(what, length, last_error.begin());
  last_error[length] = '\0';
  return status;
}

inferos_status status_of(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::kConfig: return INFEROS_CONFIG;
    case ErrorCode::kShape: return INFEROS_SHAPE;
    case ErrorCode::kBudget: return INFEROS_BUDGET;
    case ErrorCode::kClosed: return INFEROS_CLOSED;
    case ErrorCode::kBusy: return INFEROS_BUSY;
    case ErrorCode::kRewind: return INFEROS_REWIND;
    case ErrorCode::kSequence: return INFEROS_SEQUENCE;
    case ErrorCode::kUnsupported: return INFEROS_UNSUPPORTED;
  }
  return INFEROS_INTERNAL;
}

template <class Fn>
inferos_status guarded(const Fn& fn) noexcept {
  try {
    fn();
    return INFEROS_OK;
  } catch (const Error& error) {
    return fail(status_of(error.code()), error.what());
  } catch (const std::bad_alloc&) {
    return fail(INFEROS_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(INFEROS_INTERNAL, error.what());
  }
}

void require(const void* pointer, const char* name) {
  if (pointer == nullptr) throw Error(ErrorCode::kShape, std::string(name) + " is null");
}

std::size_t count(std::int64_t value, const char* name, ErrorCode code = ErrorCode::kConfig) {
  if (value < 0) throw Error(code, std::string(name) + ": " + std::to_string(value) + " is negative");
  return static_cast<std::size_t>(value);
}

// The value of an enum that a C host may have set to anything.
int within(int value, int low, int high, const char* name) {
  if (value < low || value > high) {
    throw Error(ErrorCode::kConfig, std::string(name) + ": " + std::to_string(value) + " is not within " +
                                        std::to_string(low) + ".." + std::to_string(high));
  }
  return value;
}

inferos::kv::Policy policy_of(const inferos_options& from) {
  inferos::kv::Policy policy;
  policy.thresholds = {from.l1, from.l2, from.l3};
  policy.gamma = from.gamma;
  policy.eviction = static_cast<inferos::kv::Eviction>(
      within(from.eviction, INFEROS_EVICT_NEVER, INFEROS_EVICT_PRESSURE, "eviction"));
  if (from.overflow != INFEROS_OVERFLOW_ERROR && from.overflow != INFEROS_OVERFLOW_EVICT) {
    throw Error(ErrorCode::kConfig, "overflow: " + std::to_string(from.overflow) + " is no inferos_overflow");
  }
  policy.overflow = static_cast<inferos::kv::Overflow>(from.overflow);
  policy.check_keys = from.l2_format == INFEROS_AUTO;
  return policy;
}

inferos::kv::CacheOptions options_of(const inferos_options& from) {
  if (from.struct_size != sizeof(inferos_options)) {
    throw Error(ErrorCode::kConfig, "options: struct_size " + std::to_string(from.struct_size) + ", this library has " +
                                        std::to_string(sizeof(inferos_options)) + "; call inferos_options_init");
  }
  require(from.layers, "options: layers");
  if (from.layer_count < 1 || from.layer_count > kMaxLayers) {
    throw Error(ErrorCode::kConfig,
                "options: layer_count " + std::to_string(from.layer_count) + " is not within 1..4096");
  }
  inferos::kv::CacheOptions options;
  options.layers.reserve(from.layer_count);
  for (std::size_t i = 0; i < from.layer_count; ++i) {
    const inferos_layer& layer = from.layers[i];
    if (layer.local_window < -1 || layer.local_window > INT32_MAX) {
      throw Error(ErrorCode::kConfig, "options: local_window " + std::to_string(layer.local_window) + " of layer " +
                                          std::to_string(i) + " is not within -1..2^31-1");
    }
    options.layers.push_back({count(layer.kv_heads, "kv_heads"), count(layer.head_dim, "head_dim"),
                              static_cast<std::int32_t>(layer.local_window)});
  }
  within(from.format, INFEROS_F16, INFEROS_AUTO, "format");
  within(from.l2_format, INFEROS_K8V4, INFEROS_AUTO, "l2_format");
  Format format = static_cast<Format>(from.format);
  if (from.format == INFEROS_AUTO) {
    options.policy = policy_of(from);
    format = from.l2_format == INFEROS_K8V4 ? Format::kK8V4 : Format::kInt4;
  }
  options.formats.assign(from.layer_count, format);
  options.recent_window = count(from.recent_window, "recent_window");
  options.sink_tokens = count(from.sink_tokens, "sink_tokens");
  options.max_tokens = count(from.max_tokens, "max_tokens");
  return options;
}

const inferos::kv::LayerShape& shape_of(const Lease& cache, std::size_t layer) {
  const auto& layers = cache->options().layers;
  if (layer >= layers.size()) {
    throw Error(ErrorCode::kShape, "layer " + std::to_string(layer) + " of " + std::to_string(layers.size()));
  }
  return layers[layer];
}

void copy(const std::array<std::size_t, INFEROS_FORMATS>& from, std::uint64_t* to) { std::ranges::copy(from, to); }

}  // namespace

extern "C" {

uint32_t inferos_c_api_version(void) { return INFEROS_C_API_VERSION; }

const char* inferos_last_error(void) { return last_error.data(); }

inferos_status inferos_set_threads(int64_t threads) {
  return guarded([&] { inferos::ThreadPool::process().resize(threads); });
}

inferos_status inferos_arena_create(uint64_t budget_bytes, inferos_arena** arena) {
  return guarded([&] {
    require(static_cast<const void*>(arena), "arena");
    *arena = std::make_unique<inferos_arena>(inferos_arena{std::make_shared<inferos::Arena>(budget_bytes)}).release();
  });
}

void inferos_arena_destroy(inferos_arena* arena) { std::default_delete<inferos_arena>()(arena); }

inferos_status inferos_arena_get_stats(const inferos_arena* arena, inferos_arena_stats* stats) {
  return guarded([&] {
    require(arena, "arena");
    require(stats, "stats");
    const inferos::ArenaStats from = arena->arena->stats();
    *stats = {from.budget_bytes, from.reserved_bytes, from.reserved_high_water_bytes, from.used_bytes};
  });
}

void inferos_options_init(inferos_options* options) {
  if (options == nullptr) return;
  const inferos::kv::CacheOptions cache;
  const inferos::kv::Policy policy;
  *options = {.struct_size = sizeof(inferos_options),
              .layers = nullptr,
              .layer_count = 0,
              .format = INFEROS_INT8,
              .recent_window = static_cast<std::int64_t>(cache.recent_window),
              .sink_tokens = static_cast<std::int64_t>(cache.sink_tokens),
              .max_tokens = static_cast<std::int64_t>(cache.max_tokens),
              .l1 = policy.thresholds.l1,
              .l2 = policy.thresholds.l2,
              .l3 = policy.thresholds.l3,
              .gamma = policy.gamma,
              .l2_format = INFEROS_AUTO,
              .eviction = INFEROS_EVICT_PRESSURE,
              .overflow = INFEROS_OVERFLOW_ERROR};
}

inferos_status inferos_create(const inferos_options* options, inferos_arena* arena, int64_t* cache) {
  return guarded([&] {
    require(options, "options");
    require(cache, "cache");
    auto shared = arena != nullptr ? arena->arena : std::make_shared<inferos::Arena>(0);
    *cache = inferos::kv::open_sequence(
        std::make_unique<inferos::kv::SequenceCache>(options_of(*options), std::move(shared)));
  });
}

inferos_status inferos_close(int64_t cache) {
  return guarded([&] { inferos::kv::close_sequence(cache); });
}

inferos_status inferos_fork(int64_t cache, int64_t* copied) {
  return guarded([&] {
    require(copied, "copy");
    *copied = inferos::kv::open_sequence(Lease(cache)->fork());
  });
}

inferos_status inferos_abandon(int64_t cache, int64_t* renamed) {
  return guarded([&] {
    require(renamed, "renamed");
    *renamed = inferos::kv::abandon(cache);
  });
}

inferos_status inferos_length(int64_t cache, int64_t* tokens) {
  return guarded([&] {
    require(tokens, "tokens");
    *tokens = Lease(cache)->length();
  });
}

inferos_status inferos_begin(int64_t cache, int64_t tokens) {
  return guarded([&] { Lease(cache)->begin(tokens); });
}

inferos_status inferos_append(int64_t cache, size_t layer, const float* k, const float* v, int64_t tokens) {
  return guarded([&] {
    require(k, "k");
    require(v, "v");
    const Lease lease(cache);
    static_cast<void>(shape_of(lease, layer));
    if (tokens != lease->pending()) {
      throw Error(lease->pending() == 0 ? ErrorCode::kSequence : ErrorCode::kShape,
                  "append: " + std::to_string(tokens) + " tokens, the step has " + std::to_string(lease->pending()));
    }
    lease->append(layer, k, v, inferos::ThreadPool::process());
  });
}

inferos_status inferos_attend(int64_t cache, size_t layer, const float* q, int64_t tokens, int64_t heads, float scale,
                              float softcap, float* out) {
  return guarded([&] {
    require(q, "q");
    require(out, "out");
    const Lease lease(cache);
    static_cast<void>(shape_of(lease, layer));
    const inferos::attention::Row row{&*lease, q, out, count(tokens, "tokens", ErrorCode::kShape), nullptr};
    if (heads > kMaxHeads) throw Error(ErrorCode::kShape, "attend: " + std::to_string(heads) + " heads are too many");
    inferos::attention::run({&row, 1}, {layer, count(heads, "heads", ErrorCode::kShape), scale, softcap},
                            inferos::ThreadPool::process());
  });
}

inferos_status inferos_commit(int64_t cache) {
  return guarded([&] { Lease(cache)->commit(); });
}

inferos_status inferos_rollback(int64_t cache) {
  return guarded([&] { Lease(cache)->rollback(); });
}

inferos_status inferos_rewind(int64_t cache, int64_t length) {
  return guarded([&] { Lease(cache)->rewind(length); });
}

inferos_status inferos_get_stats(int64_t cache, inferos_stats* stats) {
  return guarded([&] {
    require(stats, "stats");
    const Lease lease(cache);
    const inferos::kv::TierBytes tiers = lease->tier_bytes();
    stats->tokens = lease->length();
    copy(tiers.bytes, stats->bytes);
    copy(tiers.blocks, stats->blocks);
    copy(tiers.tokens, stats->token_heads);
    stats->score_bytes = tiers.score_bytes;
    stats->shared_bytes = tiers.shared_bytes;
    stats->evicted_token_heads = tiers.evicted;
    stats->evicted_mass = lease->evicted_mass();
  });
}

}  // extern "C"
