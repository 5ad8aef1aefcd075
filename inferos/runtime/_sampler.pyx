# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# distutils: language=c++
"""The sampler's arithmetic. `inferos.runtime.sampler` validates and documents; this file computes.

Everything that decides a token is made of IEEE double additions, multiplications, divisions and comparisons in a
fixed order (also exp: `_exp` below), so that equal logits, options and seed give equal tokens on every machine.
"""

from libc.math cimport HUGE_VAL, log
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t
from libc.string cimport memcpy
from libcpp.algorithm cimport partial_sort
from libcpp.vector cimport vector

cdef struct Candidate:
    double weight
    int32_t id


cdef inline bint _more_likely(const Candidate& a, const Candidate& b) noexcept nogil:
    return a.weight > b.weight or (a.weight == b.weight and a.id < b.id)


cdef inline double _exp(double x) noexcept nogil:
    """exp(x) for x <= 0, within 2 units in the last place; 0 below -708. No libm: its last bit differs by platform.

    Free of branches, so that loops over it become SIMD.
    """
    cdef double shifted, k, r, p, scale
    cdef uint64_t bits
    cdef double in_range = 1.0 if x >= -708.0 else 0.0
    x = x if x >= -708.0 else -708.0
    # Adding 1.5 * 2^52 rounds to the nearest integer and leaves it in the low bits.
    shifted = x * 1.4426950408889634 + 6755399441055744.0
    k = shifted - 6755399441055744.0
    r = (x - k * 0.6931471803691238) - k * 1.9082149292705877e-10
    p = 1.6059043836821613e-10
    p = p * r + 2.08767569878681e-09
    p = p * r + 2.505210838544172e-08
    p = p * r + 2.755731922398589e-07
    p = p * r + 2.7557319223985893e-06
    p = p * r + 2.48015873015873e-05
    p = p * r + 1.984126984126984e-04
    p = p * r + 1.388888888888889e-03
    p = p * r + 8.333333333333333e-03
    p = p * r + 4.1666666666666664e-02
    p = p * r + 1.6666666666666666e-01
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    memcpy(&bits, &shifted, 8)
    bits = (bits + 1023) << 52
    memcpy(&scale, &bits, 8)
    return p * scale * in_range


cdef inline uint64_t _mix(uint64_t z) noexcept nogil:
    """SplitMix64's output function (https://doi.org/10.1145/2660193.2660195)."""
    z = (z ^ (z >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t>0x94D049BB133111EB
    return z ^ (z >> 31)


cdef inline double _uniform(uint64_t seed, uint64_t draw) noexcept nogil:
    """Draw number `draw` of `seed`, in [0, 1) with 53 bits: SplitMix64 started at mix(seed)."""
    cdef uint64_t z = _mix(_mix(seed) + (draw + 1) * <uint64_t>0x9E3779B97F4A7C15)
    return <double>(z >> 11) * 1.1102230246251565e-16


def uniform(uint64_t seed, uint64_t draw):
    return _uniform(seed, draw)


def exp_nonpositive(double x):
    return _exp(x)


cdef class SamplerCore:
    cdef double temperature, top_p, min_p, penalty
    cdef int64_t top_k
    cdef uint64_t seed
    cdef readonly uint64_t draws
    cdef vector[uint8_t] seen
    cdef vector[double] logits
    cdef vector[double] weights
    cdef vector[Candidate] pool

    def __init__(self, double temperature, int64_t top_k, double top_p, double min_p, double penalty, uint64_t seed):
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.min_p = min_p
        self.penalty = penalty
        self.seed = seed
        self.draws = 0

    def observe(self, const int64_t[::1] ids):
        """Count ids as having occurred, without a draw."""
        cdef Py_ssize_t i
        for i in range(ids.shape[0]):
            self._saw(ids[i])

    def accept(self, int64_t token):
        self._saw(token)
        self.draws += 1

    def next(self, const float[::1] logits):
        """(id, logprob), or (-1, nan) where no logit is finite. Changes nothing that a later call can see."""
        cdef int64_t chosen
        cdef double logprob = 0.0
        with nogil:
            chosen = self._next(logits, &logprob)
        return chosen, logprob

    cdef void _saw(self, int64_t id) except *:
        if id < 0 or id > 0x7FFFFFFE:
            return
        if <uint64_t>id >= self.seen.size():
            self.seen.resize(<size_t>id + 1, 0)
        self.seen[<size_t>id] = 1

    cdef int64_t _next(self, const float[::1] raw, double* logprob) except? -2 nogil:
        cdef size_t i, n = <size_t>raw.shape[0]
        cdef const float* given = &raw[0]
        cdef double top = -HUGE_VAL, total = 0.0, best = -HUGE_VAL, temperature = self.temperature
        cdef double* z
        cdef double* weight
        cdef int64_t chosen = -1
        self.logits.resize(n)
        self.weights.resize(n)
        z, weight = self.logits.data(), self.weights.data()
        for i in range(n):
            # x - x is 0 for finite x only.
            z[i] = given[i] if given[i] - given[i] == 0 else -HUGE_VAL
        for i in range(n):
            top = z[i] if z[i] > top else top
        if top == -HUGE_VAL:
            return -1
        for i in range(n):
            weight[i] = _exp(z[i] - top)
        for i in range(n):
            total += weight[i]
        if self.penalty != 1.0:
            for i in range(min(n, self.seen.size())):
                if self.seen[i]:
                    z[i] = z[i] / self.penalty if z[i] > 0 else z[i] * self.penalty
        for i in range(n):
            if z[i] > best:
                best, chosen = z[i], <int64_t>i
        if temperature > 0:
            for i in range(n):
                weight[i] = _exp((z[i] - best) / temperature)
            chosen = self._draw(n)
        logprob[0] = (<double>given[chosen] - top) - log(total)
        return chosen

    cdef int64_t _draw(self, size_t n) except? -2 nogil:
        """An id drawn by its weight; the most likely id has weight 1."""
        cdef size_t i
        cdef double kept = 0.0, target, walked = 0.0
        cdef double* weight = self.weights.data()
        cdef Candidate edge, here
        cdef int64_t last = -1
        edge.weight, edge.id = 0.0, 0x7FFFFFFF
        if (self.top_k > 0 and <size_t>self.top_k < n) or self.top_p < 1.0:
            self._cut(n, &edge)
        if self.min_p > 0 and edge.weight < self.min_p:
            edge.weight, edge.id = self.min_p, 0x7FFFFFFF
        for i in range(n):
            here.weight, here.id = weight[i], <int32_t>i
            if _more_likely(edge, here):
                weight[i] = 0.0
            kept += weight[i]
        target = kept * _uniform(self.seed, self.draws)
        for i in range(n):
            if weight[i] > 0:
                walked += weight[i]
                last = <int64_t>i
                if walked > target:
                    break
        return last

    cdef int _cut(self, size_t n, Candidate* edge) except -1 nogil:
        """Sets edge to the least likely candidate that top-k and then top-p keep. Sorts only as far down as it must."""
        cdef size_t i, ready = 0, wanted, limit = n
        cdef double total = 0.0, walked = 0.0
        self.pool.resize(n)
        for i in range(n):
            self.pool[i].weight, self.pool[i].id = self.weights[i], <int32_t>i
        if 0 < self.top_k and <size_t>self.top_k < n:
            limit = ready = <size_t>self.top_k
            partial_sort(self.pool.begin(), self.pool.begin() + ready, self.pool.end(), &_more_likely)
            if self.top_p >= 1.0:
                edge[0] = self.pool[limit - 1]
                return 0
        for i in range(limit):
            total += self.pool[i].weight
        i = 0
        while True:
            if i == ready:
                wanted = min(limit, max(ready * 4, <size_t>64))
                partial_sort(self.pool.begin() + ready, self.pool.begin() + wanted, self.pool.end(), &_more_likely)
                ready = wanted
            walked += self.pool[i].weight
            if walked >= self.top_p * total or i + 1 == limit:
                edge[0] = self.pool[i]
                return 0
            i += 1
