# cython: language_level=3
"""A Cython host: decodes over a cache of Python's, without the GIL.

    cythonize -i examples/cython_host.pyx   with inferos.capi.get_include() and inferos.capi.library_path()
"""

from libc.stdint cimport int64_t

from inferos cimport capi

import inferos  # loads the library, so that this module and Python share one  # noqa: F401


def decode(int64_t handle, const float[:, :, ::1] k, const float[:, :, ::1] v, const float[:, :, ::1] q, float[:, :, ::1] out):
    """One token through every layer: k, v (layers, kv_heads, head_dim), q and out (layers, heads, head_dim)."""
    cdef size_t layer
    with nogil:
        capi.check(capi.inferos_begin(handle, 1))
        for layer in range(<size_t>k.shape[0]):
            capi.check(capi.inferos_append(handle, layer, &k[layer, 0, 0], &v[layer, 0, 0], 1))
            capi.check(capi.inferos_attend(handle, layer, &q[layer, 0, 0], 1, q.shape[1], 0, 0, &out[layer, 0, 0]))
        capi.check(capi.inferos_commit(handle))


def held(int64_t handle):
    """Committed tokens, and bytes by format: f16, int8, k8v4, int4."""
    cdef capi.inferos_stats stats
    capi.check(capi.inferos_get_stats(handle, &stats))
    return stats.tokens, [stats.bytes[i] for i in range(capi.INFEROS_FORMATS)]
