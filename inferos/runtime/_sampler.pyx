# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# distutils: language=c++
"""The sampler's arithmetic. `inferos.runtime.sampler` validates and documents; this file computes.

Everything that decides a token is made of IEEE additions, multiplications, divisions and comparisons in a fixed order
(also exp: `_exp` below), so that equal logits, options and seed give equal tokens on every machine.

The vocabulary is read by the kernels of csrc/kernels/logits.hpp, which know chunks of 256 logits: the largest of each
bounds what can be kept, and only chunks that reach the bound are looked at one by one.
"""

from libc.math cimport HUGE_VAL, INFINITY, isfinite, log, nextafterf
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t
from libc.string cimport memcpy
from libcpp.algorithm cimport nth_element, sort
from libcpp.vector cimport vector

cdef extern from "kernels/logits.hpp" namespace "inferos::kernels" nogil:
    const size_t CHUNK "inferos::kernels::kLogitsChunk"
    cppclass Logits:
        float (*largest)(const float*, size_t, float*) noexcept
        double (*weigh)(const float*, size_t, float, float, float*) noexcept
        size_t (*at_least)(const float*, size_t, float, int32_t*) noexcept
    const Logits& logits_of_this_cpu "inferos::kernels::logits"() except +

cdef struct Candidate:
    double logit
    double weight
    int32_t id


cdef inline bint _lower_id(const Candidate& a, const Candidate& b) noexcept nogil:
    return a.id < b.id


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
    cdef const Logits* kernels
    cdef vector[uint8_t] seen       # by id
    cdef vector[int32_t] seen_ids
    cdef vector[float] unseen       # the logits without those that the penalty changes
    cdef vector[Candidate] changed  # those
    cdef vector[float] tops         # the largest unchanged logit of each chunk
    cdef vector[float] sums         # the weights of each chunk
    cdef vector[int32_t] positions  # within a chunk
    cdef vector[Candidate] pool     # what may be drawn, by id
    cdef vector[double] ranked      # its weights, negated, the heaviest first as far as needed
    cdef double edge                # the lowest weight that may be drawn
    cdef size_t at_edge             # how many ids of just that weight, the lowest first

    def __init__(self, double temperature, int64_t top_k, double top_p, double min_p, double penalty, uint64_t seed):
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.min_p = min_p
        self.penalty = penalty
        self.seed = seed
        self.draws = 0
        self.kernels = &logits_of_this_cpu()
        self.positions.resize(CHUNK)

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
            chosen = self._next(&logits[0], <size_t>logits.shape[0], &logprob)
        return chosen, logprob

    cdef void _saw(self, int64_t id) except *:
        if id < 0 or id > 0x7FFFFFFE:
            return
        if <uint64_t>id >= self.seen.size():
            self.seen.resize(<size_t>id + 1, 0)
        if not self.seen[<size_t>id]:
            self.seen[<size_t>id] = 1
            self.seen_ids.push_back(<int32_t>id)

    cdef int64_t _next(self, const float* given, size_t n, double* logprob) except? -2 nogil:
        cdef float top
        cdef double total
        cdef int64_t chosen
        self.tops.resize((n + CHUNK - 1) // CHUNK)
        self.sums.resize(self.tops.size())
        top = self.kernels.largest(given, n, self.tops.data())
        if top == -INFINITY:
            return -1
        total = self.kernels.weigh(given, n, top, 1.0, self.sums.data())
        self.changed.clear()
        if self.penalty != 1.0 and self.seen_ids.size() > 0:
            self._penalise(given, n)
            chosen = self._choose(given, self.unseen.data(), n, self.kernels.largest(self.unseen.data(), n, self.tops.data()))
        else:
            chosen = self._choose(given, given, n, top)
        logprob[0] = (<double>given[chosen] - <double>top) - log(total)
        return chosen

    cdef inline double _penalised(self, double logit) noexcept nogil:
        return logit / self.penalty if logit > 0 else logit * self.penalty

    cdef int _penalise(self, const float* given, size_t n) except -1 nogil:
        """Parts the logits into `unseen` and `changed`."""
        cdef Candidate here
        cdef int32_t id
        self.unseen.resize(n)
        memcpy(self.unseen.data(), given, n * sizeof(float))
        for id in self.seen_ids:
            if <size_t>id < n and isfinite(given[id]):
                here.id, here.weight, here.logit = id, 0.0, self._penalised(given[id])
                self.changed.push_back(here)
                self.unseen[id] = -INFINITY
        return 0

    cdef int64_t _choose(self, const float* given, const float* z, size_t n, float top) except? -2 nogil:
        """z: the unchanged logits, `top` the largest of them."""
        cdef size_t k = <size_t>self.top_k if 0 < self.top_k and <size_t>self.top_k < n else 0
        cdef double best = top, bound = -HUGE_VAL, total = 0.0
        cdef Candidate here
        for here in self.changed:
            best = here.logit if here.logit > best else best
        if self.temperature == 0:
            return self._first(z, n, best)
        if k > 0:
            bound = self._bound_of(k)
        elif self.top_p < 1.0 or self.min_p == 0:
            total = self._total(z, n, top, best)
            if self.top_p >= 1.0 and self.min_p == 0:
                return self._walk_all(given, n, best, total)
            # Whatever weighs less than this is outside: all of it together has not the share that top_p leaves.
            if self.top_p < 1.0:
                bound = best + self.temperature * log((1.0 - self.top_p) * total / <double>n)
        # Top-p's share is one of all that top-k keeps: what min-p drops afterwards counts too.
        if self.min_p > 0 and (k == 0 or self.top_p >= 1.0):
            bound = max(bound, best + self.temperature * log(self.min_p))
        # The exact weights decide; a bound from libm, whose last bit differs by platform, only has to be low enough.
        self._collect(z, n, bound - 1e-6 * self.temperature - 1e-12 * abs(best))
        self._cut(k, best, total)
        return self._walk_pool()

    cdef int64_t _first(self, const float* z, size_t n, double best) noexcept nogil:
        """The lowest id whose logit is `best`."""
        cdef size_t chunk, i
        cdef int64_t found = 0x7FFFFFFF
        cdef Candidate here
        for here in self.changed:
            if here.logit == best and here.id < found:
                found = here.id
        for chunk in range(self.tops.size()):
            if self.tops[chunk] != best:
                continue
            for i in range(chunk * CHUNK, n):
                if z[i] == best:
                    return min(found, <int64_t>i)
        return found

    cdef double _bound_of(self, size_t k) noexcept nogil:
        """A logit that at least k reach, and not many more do: it is the largest of no more than k chunks, or below."""
        cdef size_t i, m = self.tops.size(), some = 0
        cdef int step, reached
        cdef float low = INFINITY, high = -INFINITY, middle
        cdef const float* tops = self.tops.data()
        for i in range(m):
            if tops[i] > -INFINITY:
                some += 1
                low = tops[i] if tops[i] < low else low
                high = tops[i] if tops[i] > high else high
        if some < k:
            return -HUGE_VAL
        for step in range(16):
            middle = low + (high - low) * <float>0.5
            reached = 0
            for i in range(m):
                reached += tops[i] >= middle
            if <size_t>reached < k:
                high = middle
                continue
            low = middle
            if <size_t>reached <= k + k // 4:
                break
        return low

    cdef double _total(self, const float* z, size_t n, float top, double best) noexcept nogil:
        """The sum of all weights. `sums` becomes that of each chunk's unchanged ids, `changed` gets its weights."""
        cdef double total = 0.0, share
        cdef size_t i
        if top > -INFINITY:
            # A temperature of next to nothing leaves the best alone, whatever its inverse.
            total = self.kernels.weigh(z, n, top, <float>min(1.0 / self.temperature, 1e30), self.sums.data())
            share = _exp((<double>top - best) / self.temperature)
            total *= share
            for i in range(self.sums.size()):
                self.sums[i] = <float>(self.sums[i] * share)
        else:
            self.sums.assign(self.sums.size(), 0)
        for i in range(self.changed.size()):
            self.changed[i].weight = _exp((self.changed[i].logit - best) / self.temperature)
            total += self.changed[i].weight
            self.sums[<size_t>self.changed[i].id // CHUNK] += <float>self.changed[i].weight
        return total

    cdef int64_t _walk_all(self, const float* given, size_t n, double best, double total) noexcept nogil:
        """Draws from the whole vocabulary: first a chunk, then an id of it."""
        cdef double target = total * _uniform(self.seed, self.draws), walked = 0.0, logit
        cdef size_t i, chunk = 0, last = 0
        cdef int64_t found = -1
        for i in range(self.sums.size()):
            if self.sums[i] > 0:
                chunk = i
                if walked + self.sums[i] > target:
                    break
                walked += self.sums[i]
        last = min(n, (chunk + 1) * CHUNK)
        for i in range(chunk * CHUNK, last):
            if not isfinite(given[i]):
                continue
            logit = given[i]
            if self.changed.size() > 0 and i < self.seen.size() and self.seen[i]:
                logit = self._penalised(logit)
            logit = _exp((logit - best) / self.temperature)
            if logit > 0:
                walked += logit
                found = <int64_t>i
                if walked > target:
                    break
        return found

    cdef int _collect(self, const float* z, size_t n, double bound) except -1 nogil:
        """Fills the pool with all ids whose logit is at least `bound`, or hardly less."""
        cdef float floor = nextafterf(<float>max(bound, -3e38), -INFINITY) if bound >= -3e38 else -INFINITY
        cdef size_t chunk, start, count, i
        cdef Candidate here
        here.weight = 0.0
        self.pool.clear()
        for chunk in range(self.tops.size()):
            if self.tops[chunk] < floor:
                continue
            start = chunk * CHUNK
            count = self.kernels.at_least(z + start, min(n - start, CHUNK), floor, self.positions.data())
            for i in range(count):
                here.id = <int32_t>start + self.positions[i]
                here.logit = z[here.id]
                self.pool.push_back(here)
        for here in self.changed:
            if here.logit >= bound:
                self.pool.push_back(here)
        return 0

    cdef int _cut(self, size_t k, double best, double total) except -1 nogil:
        """Weighs the pool, and finds the lowest weight that top-k and then top-p keep, and how many ids of just that."""
        cdef size_t i, ready = 0, sorted_to, n = self.pool.size(), limit = n
        cdef double walked = 0.0
        self.edge, self.at_edge = 0.0, n
        for i in range(n):
            self.pool[i].weight = _exp((self.pool[i].logit - best) / self.temperature)
        if (k == 0 or n <= k) and self.top_p >= 1.0:
            return 0
        self.ranked.resize(n)
        for i in range(n):
            self.ranked[i] = -self.pool[i].weight  # ascending, so that < sorts
        if k > 0:
            limit = min(k, n)
            self._rank(0, limit)
            ready = limit
            for i in range(limit):
                total -= self.ranked[i]
        i = 0 if self.top_p < 1.0 else limit - 1
        while i + 1 < limit:
            if i == ready:
                sorted_to = min(limit, max(ready * 8, <size_t>64))
                self._rank(ready, sorted_to)
                ready = sorted_to
            walked -= self.ranked[i]
            if walked >= self.top_p * total:
                break
            i += 1
        self.edge, self.at_edge = -self.ranked[i], 0
        while self.at_edge <= i and self.ranked[i - self.at_edge] == self.ranked[i]:
            self.at_edge += 1
        return 0

    cdef void _rank(self, size_t begin, size_t end) noexcept nogil:
        """Puts the heaviest of `ranked` in their places begin..end-1, if those before are in theirs."""
        if end < self.ranked.size():
            nth_element(self.ranked.begin() + begin, self.ranked.begin() + end, self.ranked.end())
        sort(self.ranked.begin() + begin, self.ranked.begin() + end)

    cdef int64_t _walk_pool(self) noexcept nogil:
        """Draws by weight, in ascending order of ids, from what is neither beyond the edge nor dropped by min-p."""
        cdef double kept = 0.0, target, walked = 0.0
        cdef size_t i, count = 0
        cdef Candidate* pool = self.pool.data()
        if self.changed.size() > 0:
            sort(self.pool.begin(), self.pool.end(), &_lower_id)
        for i in range(self.pool.size()):
            if pool[i].weight < self.edge or pool[i].weight < self.min_p or pool[i].weight == 0:
                continue
            if pool[i].weight == self.edge:
                if self.at_edge == 0:
                    continue
                self.at_edge -= 1
            kept += pool[i].weight
            pool[count] = pool[i]
            count += 1
        target = kept * _uniform(self.seed, self.draws)
        for i in range(count):
            walked += pool[i].weight
            if walked > target:
                return pool[i].id
        return pool[count - 1].id
