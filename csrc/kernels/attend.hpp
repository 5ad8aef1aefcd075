#pragma once
// Attention of the query heads that share one kv head over a list of blocks of one format: the decode kernel and the prefill tile.
// Online softmax (https://arxiv.org/abs/2112.05682): callers keep a Partial per query head and merge partials by log-sum-exp.
//
// Every ISA returns the same bits. To make that possible the arithmetic is fixed:
//   * sums over a dimension run in 16 lanes (lane = index % 16) with fused multiply-adds in index order, from 0, then
//     reduce16: lanes (i, i+8), then (i, i+4), (i, i+2), (i, i+1) are added, in that order;
//   * exp is the polynomial of exp_constants.hpp, the same operations everywhere; it is exactly 0 below -64;
//   * quantised products are exact integers.
// Promised where |q| < 2^90 and FP16 blocks are finite (packed blocks are, by construction). A NaN in K or V of a token makes l or
// o of the heads that see it NaN (where l is, m and o are unspecified), but for values whose weight is too small to count; a head with
// larger or no finite q gets unspecified values. Nothing is read or written out of bounds.
//
// Decode, one query token. For each block, in list order, for each query head g:
//   [lo, hi) = [begin, end) cut to the visible range; a block with none is skipped (its logits are -inf; for the mass its p are 0 and its m is -inf)
//   logits, tokens lo..hi-1:
//     F16   s[t] = scale * sum_d q[d] * K[d][t]            (fma over d ascending, from 0)
//     K8    w[d] = q[d] * kscale[d]; a = max |w|; W[d] = rint(w[d] * (16256 / a)) (all 0 where a < 2^-100);   bias = reduce16(sum q[d] * kmin[d])
//           s[t] = fma(float(sum_d W[d] * code[d][t]), (a / 16256) * scale, bias * scale)
//           (VNNI: W = 128 * hi + lo, both s8; AVX2: 16-bit products. The integer is the same.)
//     K4    the same with 127 instead of 16256: storage error dominates by 10x
//   softcap > 0: s = softcap * tanh(s / softcap), tanh(x) = copysign((1 - e) / (1 + e), x) with e = exp(-2 |x|)
//   all other tokens: s = -inf, p = 0
//   m' = max(m, max s) + 0, NaN ignored; x = m', or 0 where m' is -inf; alpha = exp(m - x); p[t] = exp(s[t] - x)
//   l = fma(l, alpha, reduce16(sum of p in lanes t % 16, ascending t))
//   exp(max s - x) < skip_below: the head is done with the block, its o stays as it is (alpha is 1, for m' = m)
//   values, D channels:
//     F16   o[d] = fma over t = lo..hi-1 ascending of p[t] * V[t][d], starting from o[d] * alpha
//     V8    r[t] = p[t] * vscale[t]; for each 16 tokens b = max r, P[t] = rint(r[t] * (255 / b)) in 0..255 (all 0 where b < 2^-100)
//           o[d] starts from o[d] * alpha, then, 16 tokens after 16 tokens, o[d] = fma(float(sum_t P[t] * code[d][t]), b / 255, o[d])
//           (One b for all 64 tokens costs twice the error of flat attention, and no less time.)
//     V4    the same with one b for all 64 tokens (storage error dominates), code - 8, and the bias  c = reduce16(sum_t p[t] * fma(vscale[t], 8, vmin[t]))  is added to every channel:
//           o[d] = fma(float(sum_t P[t] * (code[d][t] - 8)), b / 255, o[d] * alpha) + c
//           (Centred, because the rounding of P times the mean of the codes would be the same error in every rotated channel,
//           and the rotation would put all of it into one channel. 2.5 times less error for one integer per head and block.)
//   A rotated format (K8V4, INT4) leaves o in the rotated domain: the caller visits those blocks first and rotates o once.
//
// Prefill: blocks are expanded once into f32 tiles and multiplied for many rows. A row that sees no token of the tile is left as it is.

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/cpu.hpp"
#include "kernels/block.hpp"

namespace inferos::kernels {

struct Visible {  // positions of the sequence that a query sees: [first, last]
  std::int32_t first;
  std::int32_t last;
};

struct DecodeTask {
  const float* q;     // [group][D]
  std::size_t group;  // query heads per kv head, 1..
  std::size_t d;      // head_dim
  float scale;        // on logits, for example 1/sqrt(D)
  float softcap;      // 0 = none
  float skip_below;   // 0 = never; 2^-24 / context loses less than one rounding of FP32 in all of a context together
  Visible visible;
  Format format;  // of all blocks of the list
  const BlockView* blocks;
  std::size_t count;
  bool near;              // whether what is read next is fetched into the first-level cache, else into the second
  const std::byte* then;  // nullptr, or what is read after these blocks
  // Partial results, read and updated: o[group][D], m[group] (-inf at the start), l[group] (0 at the start).
  float* o;
  float* m;
  float* l;
  float* logits;  // nullptr, or [count][group][64]: the logits s
  // For the attention mass, both or neither (nullptr): [count][group][64] p as fp16 (nearest, ties to even), and [count][group] the m' that
  // they are relative to: the logits would be twice the bytes, which the blocks push out of L2, and each exp a second one.
  std::uint16_t* seen_p;
  float* seen_m;
};

struct PrefillTile {
  const float* q;  // [rows][D]
  std::size_t rows;
  std::size_t d;
  float scale;
  float softcap;
  const float* k;            // [D][64] f32
  const float* v;            // [64][D] f32
  std::int32_t start;        // position of the tile's token 0
  std::uint16_t begin, end;  // valid tokens of the tile
  const Visible* visible;    // [rows]
  float* o;                  // [rows][D]
  float* m;                  // [rows]
  float* l;                  // [rows]
};

struct Attend {
  Isa isa;
  void (*decode)(const DecodeTask& task) noexcept;
  // Expands one block into the tiles of PrefillTile: minimum + scale * code as one fma (V8: scale * code). Tokens outside
  // [begin, end) become 0. V stays in the block's own domain (rotated for K8V4 and INT4).
  // A token with a NaN in V gets zeros for V and a NaN in channel 0 of K: who sees it gets NaN, and nobody else can.
  void (*expand)(Format format, const BlockView& block, std::size_t d, float* k, float* v) noexcept;
  // s = scale * (q . k) by fma over d ascending; then softcap, mask, m, alpha, p, l as in decode; o by fma over
  // t = lo..hi-1 ascending from o * alpha + 0. (Never -0: so a product with p = 0 changes no bit, and an ISA may take the
  // tokens that any of several rows sees for all of them.)
  void (*prefill)(const PrefillTile& tile) noexcept;
  // Attention mass of a block: sum[t] = f[g] * p[g][t] by fma over g ascending, from 0; f[g] = weight[g] * exp(m[g] - top[g]).
  // p [group][64] and m [group] as decode left them, top and weight [group], sum [64]; no m above its head's top.
  void (*mass)(const std::uint16_t* p, const float* m, std::size_t group, const float* top, const float* weight,
               float* sum) noexcept;
  // out[i] = exp(x[i] - top), 64 of them, none above top.
  void (*exp_below)(const float* x, float top, float* out) noexcept;
};

std::span<const Attend> attend_runnable();
const Attend& attend();

}  // namespace inferos::kernels
