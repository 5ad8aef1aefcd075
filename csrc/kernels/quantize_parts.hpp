// What quantize.cpp of avx2/ and avx512vnni/ share: the order in which a block is gone through. Not a header of its own: each of
// the two includes it once, inside its anonymous namespace, behind the vector operations it is written in:
//   kLanes, Vector (floats), Words (dwords), Grid; load<kClean>(x); load_floats, store_floats (aligned), all; no_words, store_words
//   asymmetric, symmetric                       extremes -> grids, stored as fp16
//   encode, near_tie, encode_again, pack_bytes  codes of one vector; whether one is near a tie; the same, exactly; of four vectors

// Each instruction set's own, further down in its file.
struct Extremes;
struct Grids;
template <bool kClean, class T>
bool extremes_of_channels(const T* x, std::size_t tokens, std::size_t d, Extremes& e) noexcept;
template <bool kClean, class T>
bool extremes_of_tokens(const T* x, std::size_t tokens, std::size_t d, Extremes& e) noexcept;
template <int kBits, bool kClean, class T>
void encode_keys(const T* x, std::size_t tokens, std::size_t d, const Grids& grids, std::uint8_t* codes) noexcept;
Words join_bytes(const Words (&code)[4]) noexcept;
Words join_nibbles(const Words (&code)[8]) noexcept;

alignas(64) constexpr float kNoRow32[kMaxHeadDim] = {};  // stands for the tokens that a short block does not have
alignas(64) constexpr std::uint16_t kNoRow16[kMaxHeadDim] = {};
const float* no_row(const float*) noexcept { return kNoRow32; }
const std::uint16_t* no_row(const std::uint16_t*) noexcept { return kNoRow16; }

// The grids of a block: one per channel for K, one per token for V.
struct Grids {
  alignas(64) float minimum[kMaxHeadDim];
  alignas(64) float scale[kMaxHeadDim];
  alignas(64) float inverse[kMaxHeadDim];

  void put(std::size_t i, const Grid& g) noexcept {
    store_floats(minimum + i, g.minimum);
    store_floats(scale + i, g.scale);
    store_floats(inverse + i, g.inverse);
  }
  Grid vector(std::size_t i) const noexcept {
    return {load_floats(minimum + i), load_floats(scale + i), load_floats(inverse + i)};
  }
  Grid one(std::size_t i) const noexcept { return {all(minimum[i]), all(scale[i]), all(inverse[i])}; }
};

// Smallest and largest value of every channel or token.
struct Extremes {
  alignas(64) float low[kMaxHeadDim];
  alignas(64) float high[kMaxHeadDim];
};

// ---- K: per channel over the tokens -------------------------------------------------------------------------------

// Where the codes of tokens t.., channels c.. of a K tile start; kPerWord = channels in one 4-byte word.
template <std::size_t kPerWord>
std::size_t k_offset(std::size_t t, std::size_t c, std::size_t d) noexcept {
  return ((t / 32 * (d / kPerWord) + c / kPerWord) * 32 + t % 32) * 4;
}

// Out of the loop, so that it costs the loop no registers: the four vectors again, those near a tie in double.
template <bool kClean, class T>
[[gnu::noinline, gnu::cold]] void encode_four_again(const T* x, std::size_t d, std::size_t count, const Grid& g,
                                                    Words* code) noexcept {
  for (std::size_t j = 0; j < count; ++j) code[j] = encode_again<false>(load<kClean>(x + j * d), g, code[j]);
}

// Four tokens of a vector of channels -> 128-bit lane j holds [4 tokens][channels 4j .. 4j+3]. Tokens from `count` on are zero.
template <bool kClean, class T>
[[gnu::always_inline]] inline Words encode_four(const T* x, std::size_t d, std::size_t count, const Grid& g) noexcept {
  Words code[4];
  Vector worst = all(0.0F);
  for (std::size_t j = 0; j < 4; ++j) {
    code[j] = j < count ? encode<false>(load<kClean>(x + j * d), g, worst) : no_words();
  }
  if (near_tie(worst)) {
    Words again[4] = {code[0], code[1], code[2], code[3]};
    encode_four_again<kClean>(x, d, count, g, again);
    for (std::size_t j = 0; j < 4; ++j) code[j] = again[j];
  }
  return pack_bytes(code);
}

template <int kBits, class T>
void quantize_k(const T* x, std::size_t tokens, std::size_t d, std::uint8_t* codes,
                std::uint16_t* scales_minima) noexcept {
  Extremes e;
  const bool good = extremes_of_channels<false>(x, tokens, d, e);
  if (!good) extremes_of_channels<true>(x, tokens, d, e);
  Grids grids;
  for (std::size_t c = 0; c < d; c += kLanes) {
    const double steps = kBits == 8 ? 255.0 : 15.0;
    grids.put(c, asymmetric(load_floats(e.low + c), load_floats(e.high + c), steps, scales_minima + c,
                            scales_minima + d + c));
  }
  if (good) {
    encode_keys<kBits, false>(x, tokens, d, grids, codes);
  } else {
    encode_keys<kBits, true>(x, tokens, d, grids, codes);
  }
}

// ---- V: per token over the channels -------------------------------------------------------------------------------

template <std::size_t kTokens, bool kSymmetric, bool kClean, class T>
[[gnu::noinline, gnu::cold]] void encode_rows_again(const T* const (&row)[kTokens], std::size_t c,
                                                    const Grid (&grid)[kTokens], Words (&code)[kTokens]) noexcept {
  for (std::size_t j = 0; j < kTokens; ++j)
    code[j] = encode_again<kSymmetric>(load<kClean>(row[j] + c), grid[j], code[j]);
}

// Codes of kTokens tokens, a vector of channels; rows that a short block does not have read zeros on a zero grid.
template <std::size_t kTokens, bool kSymmetric, bool kClean, class T>
[[gnu::always_inline]] inline void encode_rows(const T* const (&row)[kTokens], std::size_t c,
                                               const Grid (&grid)[kTokens], Words (&code)[kTokens]) noexcept {
  Vector worst = all(0.0F);
  for (std::size_t j = 0; j < kTokens; ++j) code[j] = encode<kSymmetric>(load<kClean>(row[j] + c), grid[j], worst);
  if (near_tie(worst)) encode_rows_again<kTokens, kSymmetric, kClean>(row, c, grid, code);
}

// kTokens = 4 for the symmetric INT8, 8 for the INT4: what fills the bytes of one word.
template <std::size_t kTokens, bool kClean, class T>
void encode_values(const T* x, std::size_t tokens, std::size_t d, const Grids& grids, void* codes) noexcept {
  constexpr std::size_t kTileBytes = kBlockTokens / kTokens * 64;
  for (std::size_t t = 0; t < kBlockTokens; t += kTokens) {
    const T* row[kTokens];
    Grid grid[kTokens];
    for (std::size_t j = 0; j < kTokens; ++j) {
      row[j] = t + j < tokens ? x + (t + j) * d : no_row(x);
      grid[j] = grids.one(t + j);
    }
    auto* to = static_cast<std::uint8_t*>(codes) + t / kTokens * 64;
    for (std::size_t c = 0; c < d; c += kLanes) {
      Words code[kTokens];
      encode_rows<kTokens, kTokens == 4, kClean>(row, c, grid, code);
      std::uint8_t* here = to + c / 16 * kTileBytes + c % 16 * 4;
      if constexpr (kTokens == 4) {
        store_words(here, join_bytes(code));
      } else {
        store_words(here, join_nibbles(code));
      }
    }
  }
}

template <class T>
void v8(const T* x, std::size_t tokens, std::size_t d, std::int8_t* codes, std::uint16_t* scales) noexcept {
  Extremes e;
  const bool good = extremes_of_tokens<false>(x, tokens, d, e);
  if (!good) extremes_of_tokens<true>(x, tokens, d, e);
  Grids grids;
  for (std::size_t t = 0; t < kBlockTokens; t += kLanes) {
    grids.put(t, symmetric(load_floats(e.low + t), load_floats(e.high + t), scales + t));
  }
  if (good) {
    encode_values<4, false>(x, tokens, d, grids, codes);
  } else {
    encode_values<4, true>(x, tokens, d, grids, codes);
  }
}

template <class T>
void v4(const T* x, std::size_t tokens, std::size_t d, std::uint8_t* codes, std::uint16_t* scales_minima) noexcept {
  Extremes e;
  const bool good = extremes_of_tokens<false>(x, tokens, d, e);
  if (!good) extremes_of_tokens<true>(x, tokens, d, e);
  Grids grids;
  for (std::size_t t = 0; t < kBlockTokens; t += kLanes) {
    grids.put(t, asymmetric(load_floats(e.low + t), load_floats(e.high + t), 15.0, scales_minima + t,
                            scales_minima + kBlockTokens + t));
  }
  if (good) {
    encode_values<8, false>(x, tokens, d, grids, codes);
  } else {
    encode_values<8, true>(x, tokens, d, grids, codes);
  }
}
