// Decode attention with AVX2 and FMA.
//
// vpmaddwd carries the 8-bit formats: codes widened to 16 bits times 16-bit weights, two products added to 32 bits, exact; vpmaddubsw
// would saturate at 255 * 127 * 2. It is safe for nibbles (15 * 127 * 2 or 255 * 15 * 2), and several of its 16-bit sums fit
// before they are widened. Both have latency 3 to 5 and issue two per cycle on Zen and on Intel since Skylake, as vfmadd does.
// 8 tokens (or channels) x up to 4 heads are 8 accumulators; with codes and one broadcast they stay within 16 registers. Codes
// are widened once per 4 heads. Lanes, chunks and what is fetched ahead are those of the AVX-512 file.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attend_isa.hpp"
#include "kernels/avx2/lanes.hpp"

namespace inferos::kernels::avx2 {
namespace {

constexpr std::size_t kT = kBlockTokens;
constexpr std::size_t kChunk = 4;                           // query heads at a time
constexpr std::size_t kAheadBytes = std::size_t{8} * 1024;  // as in the AVX-512 file

struct Scratch {
  const char* ahead;                                    // the next line to fetch, and the step to the one after it:
  std::size_t ahead_step;                               // 0 but for the first chunk of a block's heads
  bool near;                                            // into which cache: DecodeTask
  alignas(32) float s[kChunk][kT];                      // logits, then probabilities
  alignas(32) float w[kChunk][kMaxHeadDim];             // q * kscale
  alignas(32) std::int16_t wide[kChunk][kMaxHeadDim];   // W of K8
  alignas(32) std::int8_t narrow[kChunk][kMaxHeadDim];  // W of K4
  alignas(32) std::int16_t p_wide[kChunk][kT];          // P of V8
  alignas(32) std::uint8_t p_narrow[kChunk][kT];        // P of V4
  float factor[kChunk];                                 // of the integer sum, and what is added to it: logits
  float bias[kChunk];
  float alpha[kChunk];
  float unit[kChunk][4];       // b / 255: of V8 for each 16 tokens, of V4 the first
  float offset[kChunk];        // c
  std::int32_t start[kChunk];  // -8 * sum of P
  bool counts[kChunk];         // whether a probability of the head reaches skip_below
};

struct Work {  // one block, one chunk of heads
  const DecodeTask& task;
  const BlockView& block;
  TokenRange range;
  std::size_t before;  // heads of the task's blocks before this one
  std::size_t head;    // first of the chunk
};

void fetch(std::size_t lines, Scratch& x) noexcept {
  if (x.near) {
    for (std::size_t i = 0; i < lines; ++i, x.ahead += x.ahead_step) _mm_prefetch(x.ahead, _MM_HINT_T0);
  } else {
    for (std::size_t i = 0; i < lines; ++i, x.ahead += x.ahead_step) _mm_prefetch(x.ahead, _MM_HINT_T1);
  }
}

__m256i broadcast4(const void* p) noexcept { return _mm256_broadcastd_epi32(_mm_loadu_si32(p)); }

__m256i broadcast8(const void* p) noexcept { return _mm256_broadcastq_epi64(_mm_loadu_si64(p)); }

// 8 + 8 integers that fit in 16 bits, in order.
__m256i pack16(__m256i low, __m256i high) noexcept {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
}

// 16 integers of 16 bits to bytes, in order.
template <bool kSigned>
__m128i pack8(__m256i sixteen) noexcept {
  const __m128i low = _mm256_castsi256_si128(sixteen);
  const __m128i high = _mm256_extracti128_si256(sixteen, 1);
  return kSigned ? _mm_packs_epi16(low, high) : _mm_packus_epi16(low, high);
}

// Pairs of 32-bit sums of four lanes each -> eight sums in order.
__m256i add_pairs(__m256i low, __m256i high) noexcept {
  return _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xD8);
}

template <std::size_t G>
void fold_queries(const Work& work, const std::byte* scales, Scratch& x) noexcept {
  const std::size_t d = work.task.d;
  const bool is_wide = work.task.format != Format::kInt4;
  const float levels = is_wide ? kWideLevels : kNarrowLevels;
  for (std::size_t g = 0; g < G; ++g) {
    const float* q = work.task.q + (work.head + g) * d;
    __m256 largest = _mm256_setzero_ps();
    __m256 bias[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (std::size_t c = 0; c < d; c += 8) {
      const __m256 qv = _mm256_loadu_ps(q + c);
      const __m256 w = _mm256_mul_ps(qv, load_half(scales + 2 * c));
      _mm256_store_ps(x.w[g] + c, w);
      largest = _mm256_max_ps(largest, absolute(w));
      bias[c / 8 % 2] = _mm256_fmadd_ps(qv, load_half(scales + 2 * (d + c)), bias[c / 8 % 2]);
    }
    const float a = largest8(largest);
    x.factor[g] = (a / levels) * work.task.scale;
    x.bias[g] = reduce16(bias[0], bias[1]) * work.task.scale;
    const __m256 up = _mm256_set1_ps(a < kSmallestMaximum ? 0.0F : levels / a);
    for (std::size_t c = 0; c < d; c += 16) {
      const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(x.w[g] + c), up));
      const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(x.w[g] + c + 8), up));
      const __m256i w = pack16(low, high);
      if (is_wide)
        _mm256_store_si256(reinterpret_cast<__m256i*>(x.wide[g] + c), w);
      else
        _mm_store_si128(reinterpret_cast<__m128i*>(x.narrow[g] + c), pack8<true>(w));
    }
  }
}

void store_logits(__m256i sum, float factor, float bias, float* s) noexcept {
  _mm256_store_ps(s, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(factor), _mm256_set1_ps(bias)));
}

template <std::size_t G>
void k8_logits(const Work& work, Scratch& x) noexcept {
  const std::size_t d = work.task.d;
  for (std::size_t t = 0; t < kT; t += 8) {
    const std::byte* codes = work.block.data + t / 32 * 32 * d + t % 32 * 4;
    __m256i sum[G][2];
    for (std::size_t g = 0; g < G; ++g) sum[g][0] = sum[g][1] = _mm256_setzero_si256();
    for (std::size_t c = 0; c < d; c += 4, codes += 128) {
      if (c % 8 == 0) fetch(1, x);
      const __m256i both = load_bytes(codes);
      const __m256i k0 = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(both));
      const __m256i k1 = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(both, 1));
      for (std::size_t g = 0; g < G; ++g) {
        const __m256i w = broadcast8(x.wide[g] + c);
        sum[g][0] = _mm256_add_epi32(sum[g][0], _mm256_madd_epi16(k0, w));
        sum[g][1] = _mm256_add_epi32(sum[g][1], _mm256_madd_epi16(k1, w));
      }
    }
    for (std::size_t g = 0; g < G; ++g)
      store_logits(add_pairs(sum[g][0], sum[g][1]), x.factor[g], x.bias[g], x.s[g] + t);
  }
}

template <std::size_t G>
void k4_logits(const Work& work, Scratch& x) noexcept {
  const std::size_t d = work.task.d;
  const __m256i low_nibbles = _mm256_set1_epi8(15);
  const __m256i ones = _mm256_set1_epi16(1);
  for (std::size_t t = 0; t < kT; t += 8) {
    const std::byte* codes = work.block.data + t / 32 * 16 * d + t % 32 * 4;
    __m256i sum[G];
    for (std::size_t g = 0; g < G; ++g) sum[g] = _mm256_setzero_si256();
    for (std::size_t c = 0; c < d;) {
      __m256i partial[G];  // 8 products of two: at most 8 * 15 * 127 * 2 = 30480
      for (std::size_t g = 0; g < G; ++g) partial[g] = _mm256_setzero_si256();
      for (const std::size_t stop = c + 32 < d ? c + 32 : d; c < stop; c += 8, codes += 128) {
        if (c % 16 == 0) fetch(1, x);
        const __m256i both = load_bytes(codes);
        const __m256i first = _mm256_and_si256(both, low_nibbles);
        const __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_nibbles);
        for (std::size_t g = 0; g < G; ++g) {
          partial[g] = _mm256_add_epi16(partial[g], _mm256_maddubs_epi16(first, broadcast4(x.narrow[g] + c)));
          partial[g] = _mm256_add_epi16(partial[g], _mm256_maddubs_epi16(second, broadcast4(x.narrow[g] + c + 4)));
        }
      }
      for (std::size_t g = 0; g < G; ++g) sum[g] = _mm256_add_epi32(sum[g], _mm256_madd_epi16(partial[g], ones));
    }
    for (std::size_t g = 0; g < G; ++g) store_logits(sum[g], x.factor[g], x.bias[g], x.s[g] + t);
  }
}

template <std::size_t G>
void f16_logits(const Work& work, Scratch& x) noexcept {
  const std::size_t d = work.task.d;
  const float* q = work.task.q + work.head * d;
  const __m256 scale = _mm256_set1_ps(work.task.scale);
  for (std::size_t panel = work.range.lo / 16; panel < (work.range.hi + 15) / 16; ++panel) {
    const std::byte* keys = work.block.data + panel * 32 * d;
    __m256 sum[G][2];
    for (std::size_t g = 0; g < G; ++g) sum[g][0] = sum[g][1] = _mm256_setzero_ps();
    for (std::size_t c = 0; c < d; ++c, keys += 32) {
      if (c % 2 == 0) fetch(1, x);
      const __m256 k0 = load_half(keys);
      const __m256 k1 = load_half(keys + 16);
      for (std::size_t g = 0; g < G; ++g) {
        const __m256 qv = _mm256_set1_ps(q[g * d + c]);
        sum[g][0] = _mm256_fmadd_ps(qv, k0, sum[g][0]);
        sum[g][1] = _mm256_fmadd_ps(qv, k1, sum[g][1]);
      }
    }
    for (std::size_t g = 0; g < G; ++g) {
      _mm256_store_ps(x.s[g] + 16 * panel, _mm256_mul_ps(scale, sum[g][0]));
      _mm256_store_ps(x.s[g] + 16 * panel + 8, _mm256_mul_ps(scale, sum[g][1]));
    }
  }
}

// Weights of 16 products r, and what the largest product of their scale is.
__m256i weigh16(__m256 low, __m256 high, float largest) noexcept {
  const __m256 up = _mm256_set1_ps(largest < kSmallestMaximum ? 0.0F : kWeightLevels / largest);
  return pack16(_mm256_cvtps_epi32(_mm256_mul_ps(low, up)), _mm256_cvtps_epi32(_mm256_mul_ps(high, up)));
}

// Probabilities times V's scales as weights, for each 16 tokens by their own largest.
void weigh8(const std::byte* scales, std::size_t g, Scratch& x) noexcept {
  for (std::size_t i = 0; i < 4; ++i) {
    const __m256 low = _mm256_mul_ps(_mm256_load_ps(x.s[g] + 16 * i), load_half(scales + 32 * i));
    const __m256 high = _mm256_mul_ps(_mm256_load_ps(x.s[g] + 16 * i + 8), load_half(scales + 32 * i + 16));
    const float b = largest8(_mm256_max_ps(low, high));
    x.unit[g][i] = b / kWeightLevels;
    _mm256_store_si256(reinterpret_cast<__m256i*>(x.p_wide[g] + 16 * i), weigh16(low, high, b));
  }
}

// The same for nibbles, by the largest of all; and what their centre adds.
void weigh4(const std::byte* scales, std::size_t g, Scratch& x) noexcept {
  const __m256 eight = _mm256_set1_ps(static_cast<float>(kNibbleCentre));
  __m256 r[8];
  __m256 largest = _mm256_setzero_ps();
  __m256 bias[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (std::size_t i = 0; i < 8; ++i) {
    const __m256 p = _mm256_load_ps(x.s[g] + 8 * i);
    const __m256 scale = load_half(scales + 16 * i);
    r[i] = _mm256_mul_ps(p, scale);
    largest = _mm256_max_ps(largest, r[i]);
    const __m256 centre = _mm256_fmadd_ps(scale, eight, load_half(scales + 2 * kT + 16 * i));
    bias[i % 2] = _mm256_fmadd_ps(p, centre, bias[i % 2]);
  }
  const float b = largest8(largest);
  __m256i total = _mm256_setzero_si256();
  for (std::size_t i = 0; i < 8; i += 2) {
    const __m256i weights = weigh16(r[i], r[i + 1], b);
    total = _mm256_add_epi32(total, _mm256_madd_epi16(weights, _mm256_set1_epi16(1)));
    _mm_store_si128(reinterpret_cast<__m128i*>(x.p_narrow[g] + 8 * i), pack8<false>(weights));
  }
  x.unit[g][0] = b / kWeightLevels;
  x.offset[g] = reduce16(bias[0], bias[1]);
  x.start[g] = -kNibbleCentre * sum8(total);
}

template <std::size_t G>
void v8_channels(const Work& work, const std::byte* values, Scratch& x) noexcept {
  for (std::size_t channel = 0; channel < work.task.d; channel += 8) {
    const std::byte* codes = values + channel / 16 * 16 * kT + channel % 16 * 4;
    __m256 o[G];
    for (std::size_t g = 0; g < G; ++g) {
      const float* old = work.task.o + (work.head + g) * work.task.d + channel;
      o[g] = _mm256_mul_ps(_mm256_loadu_ps(old), _mm256_set1_ps(x.alpha[g]));
    }
    for (std::size_t i = 0; i < 4; ++i) {
      __m256i sum[G][2];
      for (std::size_t g = 0; g < G; ++g) sum[g][0] = sum[g][1] = _mm256_setzero_si256();
      for (std::size_t t = 16 * i; t < 16 * (i + 1); t += 4, codes += 64) {
        if (t % 8 == 0) fetch(1, x);
        const __m256i both = load_bytes(codes);
        const __m256i v0 = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(both));
        const __m256i v1 = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(both, 1));
        for (std::size_t g = 0; g < G; ++g) {
          const __m256i p = broadcast8(x.p_wide[g] + t);
          sum[g][0] = _mm256_add_epi32(sum[g][0], _mm256_madd_epi16(v0, p));
          sum[g][1] = _mm256_add_epi32(sum[g][1], _mm256_madd_epi16(v1, p));
        }
      }
      for (std::size_t g = 0; g < G; ++g) {
        const __m256 now = _mm256_cvtepi32_ps(add_pairs(sum[g][0], sum[g][1]));
        o[g] = _mm256_fmadd_ps(now, _mm256_set1_ps(x.unit[g][i]), o[g]);
      }
    }
    for (std::size_t g = 0; g < G; ++g) {
      if (x.counts[g]) _mm256_storeu_ps(work.task.o + (work.head + g) * work.task.d + channel, o[g]);
    }
  }
}

template <std::size_t G>
void v4_channels(const Work& work, const std::byte* values, Scratch& x) noexcept {
  const __m256i low_nibbles = _mm256_set1_epi8(15);
  const __m256i ones = _mm256_set1_epi16(1);
  for (std::size_t channel = 0; channel < work.task.d; channel += 8) {
    const std::byte* codes = values + channel / 16 * 8 * kT + channel % 16 * 4;
    __m256i sum[G];
    for (std::size_t g = 0; g < G; ++g) sum[g] = _mm256_set1_epi32(x.start[g]);
    for (std::size_t t = 0; t < kT;) {
      __m256i partial[G];  // 4 products of two: at most 4 * 255 * 15 * 2 = 30600
      for (std::size_t g = 0; g < G; ++g) partial[g] = _mm256_setzero_si256();
      for (const std::size_t stop = t + 16; t < stop; t += 8, codes += 64) {
        if (t % 16 == 0) fetch(1, x);
        const __m256i both = load_bytes(codes);
        const __m256i first = _mm256_and_si256(both, low_nibbles);
        const __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_nibbles);
        for (std::size_t g = 0; g < G; ++g) {
          partial[g] = _mm256_add_epi16(partial[g], _mm256_maddubs_epi16(broadcast4(x.p_narrow[g] + t), first));
          partial[g] = _mm256_add_epi16(partial[g], _mm256_maddubs_epi16(broadcast4(x.p_narrow[g] + t + 4), second));
        }
      }
      for (std::size_t g = 0; g < G; ++g) sum[g] = _mm256_add_epi32(sum[g], _mm256_madd_epi16(partial[g], ones));
    }
    for (std::size_t g = 0; g < G; ++g) {
      if (!x.counts[g]) continue;
      float* o = work.task.o + (work.head + g) * work.task.d + channel;
      const __m256 old = _mm256_mul_ps(_mm256_loadu_ps(o), _mm256_set1_ps(x.alpha[g]));
      const __m256 now = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[g]), _mm256_set1_ps(x.unit[g][0]), old);
      _mm256_storeu_ps(o, _mm256_add_ps(now, _mm256_set1_ps(x.offset[g])));
    }
  }
}

template <std::size_t G>
void f16_channels(const Work& work, const std::byte* values, Scratch& x) noexcept {
  const std::size_t d = work.task.d;
  for (std::size_t channel = 0; channel < d; channel += 16) {
    float* o = work.task.o + work.head * d + channel;
    __m256 sum[G][2];
    for (std::size_t g = 0; g < G; ++g) {
      const __m256 alpha = _mm256_set1_ps(x.alpha[g]);
      sum[g][0] = _mm256_mul_ps(_mm256_loadu_ps(o + g * d), alpha);
      sum[g][1] = _mm256_mul_ps(_mm256_loadu_ps(o + g * d + 8), alpha);
    }
    for (std::size_t t = work.range.lo; t < work.range.hi; ++t) {
      const std::byte* at = values + 2 * (t * d + channel);
      if (t % 2 == 0) fetch(1, x);
      const __m256 v0 = load_half(at);
      const __m256 v1 = load_half(at + 16);
      for (std::size_t g = 0; g < G; ++g) {
        const __m256 p = _mm256_set1_ps(x.s[g][t]);
        sum[g][0] = _mm256_fmadd_ps(p, v0, sum[g][0]);
        sum[g][1] = _mm256_fmadd_ps(p, v1, sum[g][1]);
      }
    }
    for (std::size_t g = 0; g < G; ++g) {
      if (!x.counts[g]) continue;
      _mm256_storeu_ps(o + g * d, sum[g][0]);
      _mm256_storeu_ps(o + g * d + 8, sum[g][1]);
    }
  }
}

template <std::size_t G>
void run_chunk(const Work& work, Scratch& x) noexcept {
  const DecodeTask& task = work.task;
  const std::byte* const record = work.block.data;
  const BlockLayout layout = packed_layout(task.format, task.d);
  if (task.format == Format::kF16) {
    f16_logits<G>(work, x);
  } else {
    fold_queries<G>(work, record + layout.k_scales, x);
    if (task.format == Format::kInt4)
      k4_logits<G>(work, x);
    else
      k8_logits<G>(work, x);
  }
  if (task.format != Format::kF16) fetch(task.d / 16 + (task.format == Format::kInt8 ? 2 : 4), x);  // scales and minima
  bool any = false;
  for (std::size_t g = 0; g < G; ++g) {
    const std::size_t head = work.head + g;
    const Shown own = shown_from(task, work.before + head);
    const Step step = softmax_step(x.s[g], work.range, task.softcap, own, task.m[head], task.l[head]);
    x.alpha[g] = step.alpha;
    x.counts[g] = !(step.largest < task.skip_below);
    any = any || x.counts[g];
  }
  if (!any) return;
  for (std::size_t g = 0; g < G; ++g) {
    if (task.format == Format::kInt8)
      weigh8(record + layout.v_scales, g, x);
    else if (task.format != Format::kF16)
      weigh4(record + layout.v_scales, g, x);
  }
  switch (task.format) {
    case Format::kF16: return f16_channels<G>(work, record + std::size_t{work.block.capacity} * task.d * 2, x);
    case Format::kInt8: return v8_channels<G>(work, record + layout.v_codes, x);
    case Format::kK8V4:
    case Format::kInt4: return v4_channels<G>(work, record + layout.v_codes, x);
  }
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
    scratch.ahead_step = 64;
    scratch.near = task.near;
    run_block({task, block, range, i * task.group, 0}, scratch);
  }
}

// The factors of 8 heads at a time: one exp for all of them.
void attend_mass(const std::uint16_t* p, const float* m, std::size_t group, const float* top, const float* weight,
                 float* sum) noexcept {
  __m256 total[8];
  for (__m256& vector : total) vector = _mm256_setzero_ps();
  for (std::size_t first = 0; first < group; first += 8) {
    const std::size_t heads = group - first < 8 ? group - first : 8;
    alignas(32) float below[8] = {};
    for (std::size_t g = 0; g < heads; ++g) below[g] = m[first + g] - top[first + g];
    alignas(32) float factors[8];
    _mm256_store_ps(factors, exp_nonpositive(_mm256_load_ps(below)));
    for (std::size_t g = 0; g < heads; ++g) {
      const __m256 factor = _mm256_set1_ps(weight[first + g] * factors[g]);
      const auto* const at = reinterpret_cast<const std::byte*>(p + (first + g) * kT);
      for (std::size_t i = 0; i < 8; ++i) total[i] = _mm256_fmadd_ps(factor, load_half(at + 16 * i), total[i]);
    }
  }
  for (std::size_t i = 0; i < 8; ++i) _mm256_storeu_ps(sum + 8 * i, total[i]);
}

void attend_exp_below(const float* x, float top, float* out) noexcept {
  for (std::size_t i = 0; i < kT; i += 8) {
    _mm256_storeu_ps(out + i, exp_nonpositive(_mm256_sub_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(top))));
  }
}

}  // namespace inferos::kernels::avx2
