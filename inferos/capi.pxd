# The functions of inferos.h for Cython; the header describes them. The calls need no GIL.
#
#     from inferos cimport capi
#     capi.check(capi.inferos_begin(handle, 1))
#
# Compile with inferos.capi.get_include() and link inferos.capi.library_path(). A host that imports inferos first has the library
# loaded already, and handles are those of inferos.KVCache.

from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef extern from "inferos.h" nogil:
    ctypedef enum inferos_status:
        INFEROS_OK
        INFEROS_CONFIG
        INFEROS_SHAPE
        INFEROS_BUDGET
        INFEROS_CLOSED
        INFEROS_BUSY
        INFEROS_REWIND
        INFEROS_SEQUENCE
        INFEROS_UNSUPPORTED
        INFEROS_MEMORY
        INFEROS_INTERNAL

    ctypedef enum inferos_format:
        INFEROS_F16
        INFEROS_INT8
        INFEROS_K8V4
        INFEROS_INT4
        INFEROS_AUTO

    ctypedef enum inferos_eviction:
        INFEROS_EVICT_NEVER
        INFEROS_EVICT_PRESSURE

    ctypedef enum inferos_overflow:
        INFEROS_OVERFLOW_ERROR
        INFEROS_OVERFLOW_EVICT

    enum:
        INFEROS_C_API_VERSION
        INFEROS_FORMATS

    ctypedef struct inferos_layer:
        int64_t kv_heads
        int64_t head_dim
        int64_t local_window

    ctypedef struct inferos_options:
        size_t struct_size
        const inferos_layer* layers
        size_t layer_count
        inferos_format format
        int64_t recent_window
        int64_t sink_tokens
        int64_t max_tokens
        double l1
        double l2
        double l3
        double gamma
        inferos_format l2_format
        inferos_eviction eviction
        inferos_overflow overflow

    ctypedef struct inferos_stats:
        int64_t tokens
        uint64_t bytes[4]
        uint64_t blocks[4]
        uint64_t token_heads[4]
        uint64_t score_bytes
        uint64_t shared_bytes
        uint64_t evicted_token_heads
        double evicted_mass

    ctypedef struct inferos_arena_stats:
        uint64_t budget_bytes
        uint64_t reserved_bytes
        uint64_t reserved_high_water_bytes
        uint64_t used_bytes

    ctypedef struct inferos_arena:
        pass

    uint32_t inferos_c_api_version() noexcept
    const char* inferos_last_error() noexcept
    inferos_status inferos_set_threads(int64_t threads) noexcept

    inferos_status inferos_arena_create(uint64_t budget_bytes, inferos_arena** arena) noexcept
    void inferos_arena_destroy(inferos_arena* arena) noexcept
    inferos_status inferos_arena_get_stats(const inferos_arena* arena, inferos_arena_stats* stats) noexcept

    void inferos_options_init(inferos_options* options) noexcept
    inferos_status inferos_create(const inferos_options* options, inferos_arena* arena, int64_t* cache) noexcept
    inferos_status inferos_close(int64_t cache) noexcept
    inferos_status inferos_fork(int64_t cache, int64_t* copy) noexcept
    inferos_status inferos_abandon(int64_t cache, int64_t* renamed) noexcept

    inferos_status inferos_length(int64_t cache, int64_t* tokens) noexcept
    inferos_status inferos_begin(int64_t cache, int64_t tokens) noexcept
    inferos_status inferos_append(int64_t cache, size_t layer, const float* k, const float* v, int64_t tokens) noexcept
    inferos_status inferos_attend(int64_t cache, size_t layer, const float* q, int64_t tokens, int64_t heads,
                                  float scale, float softcap, float* out) noexcept
    inferos_status inferos_commit(int64_t cache) noexcept
    inferos_status inferos_rollback(int64_t cache) noexcept
    inferos_status inferos_rewind(int64_t cache, int64_t length) noexcept
    inferos_status inferos_get_stats(int64_t cache, inferos_stats* stats) noexcept


cdef inline int check(inferos_status status) except -1 nogil:
    """Raises the class of inferos.errors that belongs to `status`, with the library's text."""
    if status == INFEROS_OK:
        return 0
    with gil:
        text = inferos_last_error().decode("utf-8", "replace")
        from inferos import errors
        kinds = {
            INFEROS_CONFIG: errors.ConfigError,
            INFEROS_SHAPE: errors.ShapeError,
            INFEROS_BUDGET: errors.BudgetError,
            INFEROS_CLOSED: errors.ClosedError,
            INFEROS_BUSY: errors.BusyError,
            INFEROS_REWIND: errors.RewindError,
            INFEROS_SEQUENCE: errors.SequenceError,
            INFEROS_UNSUPPORTED: errors.UnsupportedError,
            INFEROS_MEMORY: MemoryError,
        }
        raise kinds.get(status, RuntimeError)(text)
