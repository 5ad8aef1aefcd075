#ifndef INFEROS_H
#define INFEROS_H
/* The C API of libinferos: KV caches of sequences, and attention over them, for hosts without Python.
 *
 * A step, with keys already rotated by their position:
 *
 *   inferos_begin(cache, tokens);
 *   for every layer: inferos_append(cache, layer, k, v, tokens);
 *                    inferos_attend(cache, layer, q, tokens, heads, 0, 0, out);
 *   inferos_commit(cache);
 *
 * A step that is not committed is dropped by the next begin, by rollback or by rewind; no token that was held before is lost.
 * An int64 names a cache; it is the same number that Python's KVCache.handle gives and that the op of a rewritten ONNX model takes
 * as its `inferos_handle` input, as long as all of them use one libinferos in the process. The library also exports
 * RegisterCustomOps for onnxruntime.
 *
 * Every function returns a status; what was wrong says inferos_last_error(). Bad arguments change nothing.
 * Thread-safe over different caches. One thread at a time uses a cache: INFEROS_BUSY otherwise. */

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define INFEROS_API __attribute__((visibility("default")))
#else
#define INFEROS_API
#endif

#define INFEROS_C_API_VERSION 1

typedef enum inferos_status {
  INFEROS_OK = 0,
  INFEROS_CONFIG = 1,      /* an option is unknown or out of range */
  INFEROS_SHAPE = 2,       /* sizes that do not fit together, or a pointer that is null */
  INFEROS_BUDGET = 3,      /* the arena's budget is used up; every token is still held */
  INFEROS_CLOSED = 4,      /* the handle is unknown, closed, or was abandoned */
  INFEROS_BUSY = 5,        /* another thread uses the cache */
  INFEROS_REWIND = 6,      /* the position cannot be reached any more */
  INFEROS_SEQUENCE = 7,    /* a call in the wrong order */
  INFEROS_UNSUPPORTED = 8, /* a form this build does not compute */
  INFEROS_MEMORY = 9,      /* the operating system has none left */
  INFEROS_INTERNAL = 10    /* a defect of the library */
} inferos_status;

/* Formats of blocks. INFEROS_AUTO as a cache's format: by importance, as the thresholds say; as its l2_format: each layer by its keys. */
typedef enum inferos_format {
  INFEROS_F16 = 0,
  INFEROS_INT8 = 1,
  INFEROS_K8V4 = 2,
  INFEROS_INT4 = 3,
  INFEROS_AUTO = 4
} inferos_format;

#define INFEROS_FORMATS 4 /* those a block can have */

typedef enum inferos_eviction { INFEROS_EVICT_NEVER = 0, INFEROS_EVICT_PRESSURE = 1 } inferos_eviction;
typedef enum inferos_overflow { INFEROS_OVERFLOW_ERROR = 0, INFEROS_OVERFLOW_EVICT = 2 } inferos_overflow;

typedef struct inferos_layer {
  int64_t kv_heads;     /* 1..1024 */
  int64_t head_dim;     /* a multiple of 16 within 16..256 */
  int64_t local_window; /* positions before its own that a query sees; -1 = all */
} inferos_layer;

/* Fill with inferos_options_init, then change. */
typedef struct inferos_options {
  size_t struct_size;
  const inferos_layer* layers; /* only read during inferos_create */
  size_t layer_count;          /* 1..4096 */
  inferos_format format;       /* what a block becomes when it leaves the recent window; INFEROS_INT8 */
  int64_t recent_window;       /* 16..512 tokens in FP16; 64 */
  int64_t sink_tokens;         /* 0..64 first tokens in FP16; 4 */
  int64_t max_tokens;          /* a step beyond it is refused; 2^30 */
  /* For INFEROS_AUTO alone. */
  double l1, l2, l3;         /* thresholds, 0 <= l3 <= l2 <= l1 <= 1; 1, 0.7, 0.3 */
  double gamma;              /* decay of the averaged attention mass per token, 0..1 exclusive; 0.997 */
  inferos_format l2_format;  /* INFEROS_K8V4, INFEROS_INT4 or INFEROS_AUTO */
  inferos_eviction eviction; /* INFEROS_EVICT_PRESSURE */
  inferos_overflow overflow; /* INFEROS_OVERFLOW_ERROR */
} inferos_options;

typedef struct inferos_stats {
  int64_t tokens;                        /* committed */
  uint64_t bytes[INFEROS_FORMATS];       /* of blocks by format, as held in the arena */
  uint64_t blocks[INFEROS_FORMATS];      /* of all layers and heads */
  uint64_t token_heads[INFEROS_FORMATS]; /* tokens held, summed over layers and heads */
  uint64_t score_bytes;                  /* importance scores */
  uint64_t shared_bytes;                 /* part of `bytes` that a fork shares */
  uint64_t evicted_token_heads;          /* tokens that were evicted, summed over layers and heads */
  double evicted_mass;                   /* largest share of a head's attention they had; NaN = not measured */
} inferos_stats;

typedef struct inferos_arena_stats {
  uint64_t budget_bytes;   /* 0 = no limit */
  uint64_t reserved_bytes; /* held from the operating system; never more than the budget */
  uint64_t reserved_high_water_bytes;
  uint64_t used_bytes; /* live blocks */
} inferos_arena_stats;

typedef struct inferos_arena inferos_arena;

/* INFEROS_C_API_VERSION of the library that is loaded. */
INFEROS_API uint32_t inferos_c_api_version(void);
/* What the last call of this thread that failed found wrong; valid until its next one. Never null. */
INFEROS_API const char* inferos_last_error(void);
/* Threads of begin, append and attend: 1..1024, the caller's included. */
INFEROS_API inferos_status inferos_set_threads(int64_t threads);

/* Memory that caches share: at most budget_bytes (0 = no limit; else at least 64 KiB). Caches keep it alive: destroy it any time. */
INFEROS_API inferos_status inferos_arena_create(uint64_t budget_bytes, inferos_arena** arena);
INFEROS_API void inferos_arena_destroy(inferos_arena* arena);
INFEROS_API inferos_status inferos_arena_get_stats(const inferos_arena* arena, inferos_arena_stats* stats);

INFEROS_API void inferos_options_init(inferos_options* options);
/* An empty cache. arena: null = one of its own, without a limit. */
INFEROS_API inferos_status inferos_create(const inferos_options* options, inferos_arena* arena, int64_t* cache);
/* Waits for a call in flight. */
INFEROS_API inferos_status inferos_close(int64_t cache);
/* A second cache with the same tokens; packed blocks are shared. INFEROS_SEQUENCE while a step is open. */
INFEROS_API inferos_status inferos_fork(int64_t cache, int64_t* copy);
/* After a hang: drops the open step and renames the cache. The old name is refused from now on, so that a late caller cannot write. */
INFEROS_API inferos_status inferos_abandon(int64_t cache, int64_t* renamed);

/* Committed tokens. */
INFEROS_API inferos_status inferos_length(int64_t cache, int64_t* tokens);
/* Opens a step of `tokens` new tokens; takes all memory that it may need, in every layer. */
INFEROS_API inferos_status inferos_begin(int64_t cache, int64_t tokens);
/* k, v: [tokens][kv_heads][head_dim]. Once per layer and step. */
INFEROS_API inferos_status inferos_append(int64_t cache, size_t layer, const float* k, const float* v, int64_t tokens);
/* q, out: [tokens][heads][head_dim], of the newest `tokens` tokens, which may be fewer than the step's; heads a multiple of kv_heads.
 * scale: of the logits, 0 = 1/sqrt(head_dim); softcap: 0 = none. After the layer's append. */
INFEROS_API inferos_status inferos_attend(int64_t cache, size_t layer, const float* q, int64_t tokens, int64_t heads,
                                          float scale, float softcap, float* out);
/* INFEROS_SEQUENCE unless every layer has appended. */
INFEROS_API inferos_status inferos_commit(int64_t cache);
INFEROS_API inferos_status inferos_rollback(int64_t cache);
/* Forgets positions >= length, an open step first. */
INFEROS_API inferos_status inferos_rewind(int64_t cache, int64_t length);
INFEROS_API inferos_status inferos_get_stats(int64_t cache, inferos_stats* stats);

#ifdef __cplusplus
}
#endif

#endif /* INFEROS_H */
