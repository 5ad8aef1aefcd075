// Decode attention with AVX-512 VNNI.
//
// vpdpbusd carries the packed formats: 64 products of u8 and s8 added to 16 integers, no saturation. On Zen 4 it has latency 4 and
// one per cycle at 512 bits (two 256-bit halves), on Zen 5 and Xeon two per cycle; vfmadd231ps is the same for FP16 blocks.
// Lanes are tokens for K and channels for V, so a query head costs one broadcast dword per vector pair and never a horizontal
// sum. Up to four heads share each load: 4 heads x 4 accumulators cover the latency and leave half of the 32 registers for
// codes and broadcasts. More heads come in further chunks over the same block while it is in L1 or L2.
// The latencies of a head's reductions and of its exp would add up to a third of the time, so four heads go through them together.
//
// Memory is kept busy all the time: while a block is computed, the lines of the record about 8 KiB ahead are fetched, in order and
// evenly over the time. On Zen 5 INT8 then runs at 0.8 to 0.9 of the speed of reading the same bytes; fetching each line's own
// counterpart, which leaves memory idle during the softmax, gave 0.57, no hints 0.3. One head alone is done with K and V sooner
// than memory delivers them, so it fetches few lines there and most before and after the softmax.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/attend_isa.hpp"
#include "kernels/avx512vnni/lanes.hpp"

namespace inferos::kernels::avx512vnni {
namespace {

constexpr std::size_t kT = kBlockTokens;
constexpr std::size_t kLineBytes = 64;
constexpr std::size_t kChunk = 4;                           // query heads at a time
constexpr std::size_t kAheadBytes = std::size_t{8} * 1024;  // measured best of 4..32 KiB
constexpr std::size_t kFartherBytes = std::size_t{4} * 1024;

enum class Fetch {  // what is read next, and into which cache
  kFirst,           // first level: DecodeTask::near
  kBoth,            // and what lies kFartherBytes behind it into the second
  kSecond,          // second level
};

// Packed blocks of several heads gain 5 to 10 % by the second hint; FP16, and one head alone, are a twentieth slower with it.
Fetch fetch_of(const DecodeTask& task) noexcept {
  if (!task.near) return Fetch::kSecond;
  return task.format != Format::kF16 && task.group > 1 ? Fetch::kBoth : Fetch::kFirst;
}

struct Scratch {
  const char* ahead;       // the next line to fetch
  std::size_t ahead_step;  // from a line to the next: 0 but for the first chunk of a block's heads
  Fetch fetch;
  alignas(64) float s[kChunk][kT];                    // logits, then probabilities
  alignas(64) float w[kChunk][kMaxHeadDim];           // q * kscale
  alignas(64) std::int8_t high[kChunk][kMaxHeadDim];  // of W = 128 * high + low; K4 has high only, and it is W
  alignas(64) std::int8_t low[kChunk][kMaxHeadDim];
  alignas(64) std::uint8_t weights[kChunk][kT];  // P
  alignas(16) float factor[kChunk];              // of the integer sum, and what is added to it: logits
  alignas(16) float bias[kChunk];
  alignas(16) float alpha[kChunk];
  alignas(16) float unit[kChunk][4];       // b / 255: of V8 for each 16 tokens, of V4 the first
  alignas(16) float offset[kChunk];        // c
  alignas(16) std::int32_t start[kChunk];  // -8 * sum of P
  unsigned counts;                         // a bit for each head, set where a probability reaches skip_below
};

struct Work {  // one block, one chunk of heads
  const DecodeTask& task;
  const BlockView& block;
  TokenRange range;
  std::size_t before;  // heads of the task's blocks before this one
  std::size_t head;    // first of the chunk
};

// The small functions are declared inline because g++ stops inlining them else, and what is bound by arithmetic loses a twentieth.
template <Fetch kFetch, class Pointer>
inline void fetch_into(std::size_t lines, Pointer& ahead, std::size_t step) noexcept {
  for (std::size_t i = 0; i < lines; ++i) {
    const char* const line = ahead;
    if constexpr (kFetch == Fetch::kSecond)
      _mm_prefetch(line, _MM_HINT_T1);
    else
      _mm_prefetch(line, _MM_HINT_T0);
    if constexpr (kFetch == Fetch::kBoth) _mm_prefetch(line + kFartherBytes, _MM_HINT_T1);
    ahead = line + step;
  }
}

// Few heads wait for memory more than for arithmetic. There the pointer is volatile: each hint waits for the one before it to pass it
// on through memory, which spreads a run of them over what follows. All at once they fill the queue of misses, and loads wait behind.
template <std::size_t G>
constexpr bool kPaced = G <= 2;

template <std::size_t G>
inline void fetch(std::size_t lines, Scratch& x) noexcept {
  using Pointer = std::conditional_t<kPaced<G>, const char* volatile, const char*>;
  Pointer& ahead = x.ahead;
  switch (x.fetch) {
    case Fetch::kFirst: fetch_into<Fetch::kFirst>(lines, ahead, x.ahead_step); break;
    case Fetch::kBoth: fetch_into<Fetch::kBoth>(lines, ahead, x.ahead_step); break;
    case Fetch::kSecond: fetch_into<Fetch::kSecond>(lines, ahead, x.ahead_step); break;
  }
}

// Lines fetched with each step over so many vectors of codes, or twice as many of FP16: as many as the step reads, but one where one
// head alone is done with them sooner than memory delivers more. (Not for FP16 heads so wide that the softmax is short beside them.)
template <std::size_t G>
constexpr std::size_t step_lines(Format format, std::size_t d, std::size_t vectors) noexcept {
  const bool f16 = format == Format::kF16;
  if (G == 1 && (!f16 || d <= 128)) return vectors == 0 ? 0 : 1;
  return f16 ? (vectors + 1) / 2 : vectors;
}

template <std::size_t G, bool kWide>
void fold_queries(const Work& work, const std::byte* scales, Scratch& x) noexcept {
  const std::size_t d = work.task.d;
  const float* q = work.task.q + work.head * d;
  __m512 largest[G];
  __m512 bias[G];
  for (std::size_t g = 0; g < G; ++g) largest[g] = bias[g] = _mm512_setzero_ps();
  for (std::size_t c = 0; c < d; c += 16) {
    fetch<G>(kWide ? 4 : 2, x);
    const __m512 scale = load_half(scales + 2 * c);
    const __m512 minimum = load_half(scales + 2 * (d + c));
    for (std::size_t g = 0; g < G; ++g) {
      const __m512 qv = _mm512_loadu_ps(q + g * d + c);
      const __m512 w = _mm512_mul_ps(qv, scale);
      _mm512_store_ps(x.w[g] + c, w);
      largest[g] = _mm512_max_ps(largest[g], _mm512_abs_ps(w));
      bias[g] = _mm512_fmadd_ps(qv, minimum, bias[g]);
    }
  }
  constexpr float kLevels = kWide ? kWideLevels : kNarrowLevels;
  const __m128 a = across<Largest>(largest);
  const __m128 scale = _mm_set1_ps(work.task.scale);
  alignas(16) float steps[kChunk];
  _mm_store_ps(steps, step_up(a, kLevels));
  _mm_store_ps(x.factor, _mm_mul_ps(_mm_div_ps(a, _mm_set1_ps(kLevels)), scale));
  _mm_store_ps(x.bias, _mm_mul_ps(across<Sum>(bias), scale));
  for (std::size_t g = 0; g < G; ++g) {
    const __m512 up = _mm512_set1_ps(steps[g]);
    for (std::size_t c = 0; c < d; c += 16) {
      const __m512i w = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(x.w[g] + c), up));
      if constexpr (kWide) {
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(w, _mm512_set1_epi32(64)), 7);
        const __m512i low = _mm512_sub_epi32(w, _mm512_slli_epi32(high, 7));
        _mm_store_si128(reinterpret_cast<__m128i*>(x.high[g] + c), _mm512_cvtepi32_epi8(high));
        _mm_store_si128(reinterpret_cast<__m128i*>(x.low[g] + c), _mm512_cvtepi32_epi8(low));
      } else {
        _mm_store_si128(reinterpret_cast<__m128i*>(x.high[g] + c), _mm512_cvtepi32_epi8(w));
      }
    }
  }
}

void store_logits(__m512i sum, float factor, float bias, float* s) noexcept {
  _mm512_store_ps(s, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(factor), _mm512_set1_ps(bias)));
}

// 32 tokens at a time: 4 heads x (high, low) x 2 vectors are 16 sums.
template <std::size_t G>
void k8_logits(const Work& work, Scratch& x) noexcept {
  const std::size_t d = work.task.d;
  for (std::size_t t = 0; t < kT; t += 32) {
    const std::byte* codes = work.block.data + t * d;
    __m512i high[G][2];
    __m512i low[G][2];
    for (std::size_t g = 0; g < G; ++g) high[g][0] = high[g][1] = low[g][0] = low[g][1] = _mm512_setzero_si512();
    for (std::size_t c = 0; c < d; c += 4, codes += 128) {
      const __m512i k0 = _mm512_loadu_si512(codes);
      const __m512i k1 = _mm512_loadu_si512(codes + 64);
      fetch<G>(1, x);
      for (std::size_t g = 0; g < G; ++g) {
        const __m512i w_high = broadcast4(x.high[g] + c);
        const __m512i w_low = broadcast4(x.low[g] + c);
        high[g][0] = dot4(high[g][0], k0, w_high);
        high[g][1] = dot4(high[g][1], k1, w_high);
        low[g][0] = dot4(low[g][0], k0, w_low);
        low[g][1] = dot4(low[g][1], k1, w_low);
      }
    }
    for (std::size_t g = 0; g < G; ++g) {
      for (std::size_t j = 0; j < 2; ++j) {
        const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[g][j], 7), low[g][j]);
        store_logits(sum, x.factor[g], x.bias[g], x.s[g] + t + 16 * j);
      }
    }
  }
}

template <std::size_t G>
void k4_logits(const Work& work, Scratch& x) noexcept {
  const std::size_t d = work.task.d;
  const std::byte* codes = work.block.data;
  const std::size_t half = 16 * d;  // bytes of 32 tokens
  const __m512i low_nibbles = _mm512_set1_epi8(15);
  __m512i sum[G][4];
  for (std::size_t g = 0; g < G; ++g) {
    for (std::size_t j = 0; j < 4; ++j) sum[g][j] = _mm512_setzero_si512();
  }
  for (std::size_t c = 0; c < d; c += 8, codes += 128) {
    fetch<G>(step_lines<G>(Format::kInt4, d, 2), x);
    __m512i first[4];
    __m512i second[4];
    for (std::size_t j = 0; j < 4; ++j) {
      const std::byte* at = codes + j / 2 * half + j % 2 * 64;
      const __m512i both = _mm512_loadu_si512(at);
      first[j] = _mm512_and_si512(both, low_nibbles);
      second[j] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_nibbles);
    }
    for (std::size_t g = 0; g < G; ++g) {
      const __m512i w_first = broadcast4(x.high[g] + c);
      const __m512i w_second = broadcast4(x.high[g] + c + 4);
      for (std::size_t j = 0; j < 4; ++j) sum[g][j] = dot4(sum[g][j], first[j], w_first);
      for (std::size_t j = 0; j < 4; ++j) sum[g][j] = dot4(sum[g][j], second[j], w_second);
    }
  }
  for (std::size_t g = 0; g < G; ++g) {
    for (std::size_t j = 0; j < 4; ++j) store_logits(sum[g][j], x.factor[g], x.bias[g], x.s[g] + 16 * j);
  }
}

// kPanels panels of 16 tokens from `panel` on.
template <std::size_t G, std::size_t kPanels>
void f16_panels(const Work& work, std::size_t panel, Scratch& x) noexcept {
  const std::size_t d = work.task.d;
  const float* q = work.task.q + work.head * d;
  const std::byte* keys = work.block.data + panel * 32 * d;
  __m512 sum[G][kPanels];
  for (std::size_t g = 0; g < G; ++g) {
    for (std::size_t j = 0; j < kPanels; ++j) sum[g][j] = _mm512_setzero_ps();
  }
  for (std::size_t c = 0; c < d; ++c) {
    if (kPanels == 4) fetch<G>(step_lines<G>(Format::kF16, d, kPanels), x);
    __m512 k[kPanels];
    for (std::size_t j = 0; j < kPanels; ++j) {
      const std::byte* at = keys + 32 * (j * d + c);
      k[j] = load_half(at);
    }
    for (std::size_t g = 0; g < G; ++g) {
      const __m512 qv = _mm512_set1_ps(q[g * d + c]);
      for (std::size_t j = 0; j < kPanels; ++j) sum[g][j] = _mm512_fmadd_ps(qv, k[j], sum[g][j]);
    }
  }
  const __m512 scale = _mm512_set1_ps(work.task.scale);
  for (std::size_t g = 0; g < G; ++g) {
    for (std::size_t j = 0; j < kPanels; ++j) {
      _mm512_store_ps(x.s[g] + 16 * (panel + j), _mm512_mul_ps(scale, sum[g][j]));
    }
  }
}

template <std::size_t G>
void f16_logits(const Work& work, Scratch& x) noexcept {
  const std::size_t first = work.range.lo / 16;
  const std::size_t past = (work.range.hi + 15) / 16;
  if (past - first == 4) return f16_panels<G, 4>(work, 0, x);
  for (std::size_t panel = first; panel < past; ++panel) f16_panels<G, 1>(work, panel, x);
}

// Probabilities times V's scales as u8 weights, for each 16 tokens by their own largest.
template <std::size_t G>
void weigh8(const std::byte* scales, Scratch& x) noexcept {
  for (std::size_t g = 0; g < G; ++g) {
    __m512 r[4];
    for (std::size_t i = 0; i < 4; ++i)
      r[i] = _mm512_mul_ps(_mm512_load_ps(x.s[g] + 16 * i), load_half(scales + 32 * i));
    const __m128 b = across<Largest>(r);
    alignas(16) float steps[4];
    _mm_store_ps(steps, step_up(b, kWeightLevels));
    _mm_store_ps(x.unit[g], _mm_div_ps(b, _mm_set1_ps(kWeightLevels)));
    for (std::size_t i = 0; i < 4; ++i) {
      const __m512i weights = _mm512_cvtps_epi32(_mm512_mul_ps(r[i], _mm512_set1_ps(steps[i])));
      _mm_store_si128(reinterpret_cast<__m128i*>(x.weights[g] + 16 * i), _mm512_cvtepi32_epi8(weights));
    }
  }
}

// The same for nibbles, by the largest of all; and what their centre adds.
template <std::size_t G>
void weigh4(const std::byte* scales, Scratch& x) noexcept {
  __m512 r[G][4];
  __m512 largest[G];
  __m512 bias[G];
  for (std::size_t g = 0; g < G; ++g) largest[g] = bias[g] = _mm512_setzero_ps();
  const __m512 eight = _mm512_set1_ps(static_cast<float>(kNibbleCentre));
  for (std::size_t i = 0; i < 4; ++i) {
    const __m512 scale = load_half(scales + 32 * i);
    const __m512 centre = _mm512_fmadd_ps(scale, eight, load_half(scales + 2 * kT + 32 * i));
    for (std::size_t g = 0; g < G; ++g) {
      const __m512 p = _mm512_load_ps(x.s[g] + 16 * i);
      r[g][i] = _mm512_mul_ps(p, scale);
      largest[g] = _mm512_max_ps(largest[g], r[g][i]);
      bias[g] = _mm512_fmadd_ps(p, centre, bias[g]);
    }
  }
  const __m128 b = across<Largest>(largest);
  alignas(16) float steps[kChunk];
  alignas(16) float units[kChunk];
  _mm_store_ps(steps, step_up(b, kWeightLevels));
  _mm_store_ps(units, _mm_div_ps(b, _mm_set1_ps(kWeightLevels)));
  __m512 total[G];
  for (std::size_t g = 0; g < G; ++g) {
    x.unit[g][0] = units[g];
    const __m512 up = _mm512_set1_ps(steps[g]);
    __m512i sum = _mm512_setzero_si512();
    for (std::size_t i = 0; i < 4; ++i) {
      const __m512i weights = _mm512_cvtps_epi32(_mm512_mul_ps(r[g][i], up));
      _mm_store_si128(reinterpret_cast<__m128i*>(x.weights[g] + 16 * i), _mm512_cvtepi32_epi8(weights));
      sum = _mm512_add_epi32(sum, weights);
    }
    total[g] = _mm512_cvtepi32_ps(sum);  // exact: at most 64 * 255 in the end
  }
  _mm_store_ps(x.offset, across<Sum>(bias));
  const __m128i sums = _mm_cvtps_epi32(across<Sum>(total));
  _mm_store_si128(reinterpret_cast<__m128i*>(x.start), _mm_mullo_epi32(sums, _mm_set1_epi32(-kNibbleCentre)));
}

template <std::size_t G, std::size_t kVectors>
void v8_channels(const Work& work, std::size_t channel, const std::byte* codes, Scratch& x) noexcept {
  __m512 o[G][kVectors];
  for (std::size_t g = 0; g < G; ++g) {
    const float* old = work.task.o + (work.head + g) * work.task.d + channel;
    for (std::size_t j = 0; j < kVectors; ++j) {
      o[g][j] = _mm512_mul_ps(_mm512_loadu_ps(old + 16 * j), _mm512_set1_ps(x.alpha[g]));
    }
  }
  for (std::size_t i = 0; i < 4; ++i) {
    __m512i sum[G][kVectors];
    for (std::size_t g = 0; g < G; ++g) {
      for (std::size_t j = 0; j < kVectors; ++j) sum[g][j] = _mm512_setzero_si512();
    }
    for (std::size_t t = 16 * i; t < 16 * (i + 1); t += 4) {
      fetch<G>(step_lines<G>(Format::kInt8, work.task.d, kVectors), x);
      __m512i v[kVectors];
      for (std::size_t j = 0; j < kVectors; ++j) v[j] = _mm512_loadu_si512(codes + (channel + 16 * j) * kT + 16 * t);
      for (std::size_t g = 0; g < G; ++g) {
        const __m512i p = broadcast4(x.weights[g] + t);
        for (std::size_t j = 0; j < kVectors; ++j) sum[g][j] = dot4(sum[g][j], p, v[j]);
      }
    }
    for (std::size_t g = 0; g < G; ++g) {
      const __m512 unit = _mm512_set1_ps(x.unit[g][i]);
      for (std::size_t j = 0; j < kVectors; ++j)
        o[g][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[g][j]), unit, o[g][j]);
    }
  }
  for (std::size_t g = 0; g < G; ++g) {
    if ((x.counts >> g & 1) == 0) continue;
    float* to = work.task.o + (work.head + g) * work.task.d + channel;
    for (std::size_t j = 0; j < kVectors; ++j) _mm512_storeu_ps(to + 16 * j, o[g][j]);
  }
}

template <std::size_t G, std::size_t kVectors>
void v4_channels(const Work& work, std::size_t channel, const std::byte* codes, Scratch& x) noexcept {
  const __m512i low_nibbles = _mm512_set1_epi8(15);
  __m512i sum[G][kVectors];
  for (std::size_t g = 0; g < G; ++g) {
    for (std::size_t j = 0; j < kVectors; ++j) sum[g][j] = _mm512_set1_epi32(x.start[g]);
  }
  for (std::size_t t = 0; t < kT; t += 8) {
    fetch<G>(step_lines<G>(Format::kInt4, work.task.d, kVectors), x);
    __m512i first[kVectors];
    __m512i second[kVectors];
    for (std::size_t j = 0; j < kVectors; ++j) {
      const std::byte* at = codes + (channel + 16 * j) * (kT / 2) + 8 * t;
      const __m512i both = _mm512_loadu_si512(at);
      first[j] = _mm512_and_si512(both, low_nibbles);
      second[j] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_nibbles);
    }
    for (std::size_t g = 0; g < G; ++g) {
      const __m512i p_first = broadcast4(x.weights[g] + t);
      const __m512i p_second = broadcast4(x.weights[g] + t + 4);
      for (std::size_t j = 0; j < kVectors; ++j) sum[g][j] = dot4(sum[g][j], p_first, first[j]);
      for (std::size_t j = 0; j < kVectors; ++j) sum[g][j] = dot4(sum[g][j], p_second, second[j]);
    }
  }
  for (std::size_t g = 0; g < G; ++g) {
    if ((x.counts >> g & 1) == 0) continue;
    float* o = work.task.o + (work.head + g) * work.task.d + channel;
    for (std::size_t j = 0; j < kVectors; ++j) {
      const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(o + 16 * j), _mm512_set1_ps(x.alpha[g]));
      const __m512 now = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[g][j]), _mm512_set1_ps(x.unit[g][0]), old);
      _mm512_storeu_ps(o + 16 * j, _mm512_add_ps(now, _mm512_set1_ps(x.offset[g])));
    }
  }
}

template <std::size_t G, std::size_t kVectors>
void f16_channels(const Work& work, std::size_t channel, const std::byte* values, Scratch& x) noexcept {
  const std::size_t d = work.task.d;
  __m512 sum[G][kVectors];
  for (std::size_t g = 0; g < G; ++g) {
    const float* o = work.task.o + (work.head + g) * d + channel;
    for (std::size_t j = 0; j < kVectors; ++j) {
      sum[g][j] = _mm512_mul_ps(_mm512_loadu_ps(o + 16 * j), _mm512_set1_ps(x.alpha[g]));
    }
  }
  for (std::size_t t = work.range.lo; t < work.range.hi; ++t) {
    fetch<G>(step_lines<G>(Format::kF16, work.task.d, kVectors), x);
    __m512 v[kVectors];
    for (std::size_t j = 0; j < kVectors; ++j) {
      const std::byte* at = values + 2 * (t * d + channel + 16 * j);
      v[j] = load_half(at);
    }
    for (std::size_t g = 0; g < G; ++g) {
      const __m512 p = _mm512_set1_ps(x.s[g][t]);
      for (std::size_t j = 0; j < kVectors; ++j) sum[g][j] = _mm512_fmadd_ps(p, v[j], sum[g][j]);
    }
  }
  for (std::size_t g = 0; g < G; ++g) {
    if ((x.counts >> g & 1) == 0) continue;
    float* o = work.task.o + (work.head + g) * d + channel;
    for (std::size_t j = 0; j < kVectors; ++j) _mm512_storeu_ps(o + 16 * j, sum[g][j]);
  }
}

template <std::size_t G, std::size_t kVectors>
void channels(const Work& work, std::size_t channel, const std::byte* values, Scratch& x) noexcept {
  switch (work.task.format) {
    case Format::kF16: return f16_channels<G, kVectors>(work, channel, values, x);
    case Format::kInt8: return v8_channels<G, kVectors>(work, channel, values, x);
    case Format::kK8V4:
    case Format::kInt4: return v4_channels<G, kVectors>(work, channel, values, x);
  }
}

template <std::size_t G>
void values(const Work& work, const std::byte* at, Scratch& x) noexcept {
  std::size_t channel = 0;
  for (; channel + 64 <= work.task.d; channel += 64) channels<G, 4>(work, channel, at, x);
  switch ((work.task.d - channel) / 16) {
    case 1: return channels<G, 1>(work, channel, at, x);
    case 2: return channels<G, 2>(work, channel, at, x);
    case 3: return channels<G, 3>(work, channel, at, x);
    default: return;
  }
}

// The lines of the record ahead that are fetched neither with K nor with V.
template <std::size_t G>
inline std::size_t softmax_lines(const Work& work) noexcept {
  const Format format = work.task.format;
  const std::size_t d = work.task.d;
  const std::size_t four = step_lines<G>(format, d, 4);
  const std::size_t odd = step_lines<G>(format, d, d % 64 / 16);
  std::size_t steps = 8;
  std::size_t keys = d / 4 + d / 2;
  if (format == Format::kInt8) steps = 16;
  if (format == Format::kInt4) keys = d / 8 + d / 8 * step_lines<G>(format, d, 2);
  if (format == Format::kF16) {
    steps = work.range.hi - work.range.lo;
    keys = steps > 48 ? d * four : 0;
  }
  const std::size_t others = keys + steps * (d / 64 * four + odd);
  const std::size_t lines = block_bytes(format, d) / kLineBytes;
  return lines > others ? lines - others : 0;
}

template <std::size_t G>
void run_chunk(const Work& work, Scratch& x) noexcept {
  const DecodeTask& task = work.task;
  const std::byte* const record = work.block.data;
  const BlockLayout layout = packed_layout(task.format, task.d);
  if (task.format == Format::kF16) {
    f16_logits<G>(work, x);
  } else if (task.format == Format::kInt4) {
    fold_queries<G, false>(work, record + layout.k_scales, x);
    k4_logits<G>(work, x);
  } else {
    fold_queries<G, true>(work, record + layout.k_scales, x);
    k8_logits<G>(work, x);
  }
  const std::size_t left = x.ahead_step == 0 ? 0 : softmax_lines<G>(work);
  const std::size_t early = kPaced<G> ? left / 2 : left;
  fetch<G>(early, x);
  const TokenRange ranges[4] = {work.range, work.range, work.range, work.range};
  const __m128 largest = softmax_step<G>(x.s, ranges, task.softcap, shown_from(task, work.before + work.head),
                                         task.m + work.head, task.l + work.head, x.alpha);
  x.counts =
      static_cast<unsigned>(_mm_movemask_ps(_mm_cmpnlt_ps(largest, _mm_set1_ps(task.skip_below)))) & ((1U << G) - 1);
  if (x.counts == 0) return;
  fetch<G>(left - early, x);
  if (task.format == Format::kInt8)
    weigh8<G>(record + layout.v_scales, x);
  else if (task.format != Format::kF16)
    weigh4<G>(record + layout.v_scales, x);
  const std::size_t f16_values = std::size_t{work.block.capacity} * task.d * 2;
  values<G>(work, record + (task.format == Format::kF16 ? f16_values : layout.v_codes), x);
}

void run_block(Work work, Scratch& x) noexcept {
  const std::size_t group = work.task.group;
  std::size_t chunks = (group + kChunk - 1) / kChunk;
  while (work.head < group) {
    const std::size_t heads = (group - work.head + chunks - 1) / chunks;  // 5 heads are 3 + 2, not 4 + 1
    switch (heads) {
      case 1: run_chunk<1>(work, x); break;
      case 2: run_chunk<2>(work, x); break;
      case 3: run_chunk<3>(work, x); break;
      default: run_chunk<4>(work, x); break;
    }
    work.head += heads;
    x.ahead_step = 0;
    --chunks;
  }
}

}  // namespace

void attend_decode(const DecodeTask& task) noexcept {
  Scratch scratch;
  const std::size_t record = block_bytes(task.format, task.d);
  const std::size_t depth = (kAheadBytes + record - 1) / record;
  for (std::size_t i = 0; i < task.count; ++i) {
    const BlockView& block = task.blocks[i];
    const TokenRange range = visible_tokens(block.start, block.begin, block.end, task.visible);
    if (range.lo >= range.hi) {
      show_nothing(shown_from(task, i * task.group), task.group);
      continue;
    }
    scratch.ahead = reinterpret_cast<const char*>(block_ahead(task, i + depth, record));
    scratch.ahead_step = kLineBytes;
    scratch.fetch = fetch_of(task);
    run_block({task, block, range, i * task.group, 0}, scratch);
  }
}

// The factors of 16 heads at a time: one exp for all of them.
void attend_mass(const std::uint16_t* p, const float* m, std::size_t group, const float* top, const float* weight,
                 float* sum) noexcept {
  __m512 total[4];
  for (__m512& vector : total) vector = _mm512_setzero_ps();
  for (std::size_t first = 0; first < group; first += 16) {
    const std::size_t heads = group - first < 16 ? group - first : 16;
    const auto here = static_cast<__mmask16>((1U << heads) - 1U);
    const __m512 below =
        _mm512_sub_ps(_mm512_maskz_loadu_ps(here, m + first), _mm512_maskz_loadu_ps(here, top + first));
    alignas(64) float factors[16];
    _mm512_store_ps(factors, _mm512_mul_ps(_mm512_maskz_loadu_ps(here, weight + first), exp_nonpositive(below)));
    for (std::size_t g = 0; g < heads; ++g) {
      const __m512 factor = _mm512_set1_ps(factors[g]);
      const auto* const at = reinterpret_cast<const std::byte*>(p + (first + g) * kT);
      for (std::size_t i = 0; i < 4; ++i) total[i] = _mm512_fmadd_ps(factor, load_half(at + 32 * i), total[i]);
    }
  }
  for (std::size_t i = 0; i < 4; ++i) _mm512_storeu_ps(sum + 16 * i, total[i]);
}

void attend_exp_below(const float* x, float top, float* out) noexcept {
  for (std::size_t i = 0; i < kT; i += 16) {
    _mm512_storeu_ps(out + i, exp_nonpositive(_mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(top))));
  }
}

}  // namespace inferos::kernels::avx512vnni
