/* A C host: two layers of attention over one compressed cache, a prompt, decoding, a rewind and a budget.
 *
 *   INCLUDE=$(python -c "from inferos import capi; print(capi.get_include())")
 *   LIBRARY=$(python -c "from inferos import capi; print(capi.library_path())")
 *   cc -std=c11 -I$INCLUDE examples/c_host.c $LIBRARY -Wl,-rpath,$(dirname $LIBRARY) -lm -o c_host
 */
#include <inferos.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { LAYERS = 2, KV_HEADS = 2, HEADS = 4, HEAD_DIM = 64, PROMPT = 500, DECODE = 100 };

static void check(inferos_status status, const char* what) {
  if (status == INFEROS_OK) return;
  fprintf(stderr, "%s: status %d: %s\n", what, (int)status, inferos_last_error());
  exit(1);
}

/* Stands for the model: K, V and Q of one token in one layer. */
static void rows(int layer, long token, int heads, float* to) {
  for (int i = 0; i < heads * HEAD_DIM; ++i) to[i] = (float)sin(0.37 * (double)token + 0.11 * i + layer);
}

/* One step of `count` tokens through every layer; the last token's output of the last layer. */
static void step(int64_t cache, long first, int count, float* last) {
  float* k = malloc(sizeof(float) * (size_t)count * KV_HEADS * HEAD_DIM);
  float* v = malloc(sizeof(float) * (size_t)count * KV_HEADS * HEAD_DIM);
  float* q = malloc(sizeof(float) * (size_t)count * HEADS * HEAD_DIM);
  float* out = malloc(sizeof(float) * (size_t)count * HEADS * HEAD_DIM);
  if (!k || !v || !q || !out) exit(1);
  check(inferos_begin(cache, count), "begin");
  for (int layer = 0; layer < LAYERS; ++layer) {
    for (int t = 0; t < count; ++t) {
      rows(layer, first + t, KV_HEADS, k + (size_t)t * KV_HEADS * HEAD_DIM);
      rows(layer + 7, first + t, KV_HEADS, v + (size_t)t * KV_HEADS * HEAD_DIM);
      rows(layer + 3, first + t, HEADS, q + (size_t)t * HEADS * HEAD_DIM);
    }
    check(inferos_append(cache, (size_t)layer, k, v, count), "append");
    check(inferos_attend(cache, (size_t)layer, q, count, HEADS, 0.0F, 0.0F, out), "attend");
  }
  check(inferos_commit(cache), "commit");
  for (int i = 0; i < HEADS * HEAD_DIM; ++i) last[i] = out[(size_t)(count - 1) * HEADS * HEAD_DIM + (size_t)i];
  free(k), free(v), free(q), free(out);
}

int main(void) {
  inferos_layer layers[LAYERS];
  for (int i = 0; i < LAYERS; ++i) layers[i] = (inferos_layer){KV_HEADS, HEAD_DIM, -1};
  inferos_options options;
  inferos_options_init(&options);
  options.layers = layers;
  options.layer_count = LAYERS;
  options.format = INFEROS_K8V4;

  inferos_arena* arena;
  check(inferos_arena_create(4 << 20, &arena), "arena_create");
  int64_t cache;
  check(inferos_create(&options, arena, &cache), "create");

  float first[HEADS * HEAD_DIM], again[HEADS * HEAD_DIM];
  step(cache, 0, PROMPT, first);
  for (long t = PROMPT; t < PROMPT + DECODE; ++t) step(cache, t, 1, first);

  /* Back by one token and once more: the same output. */
  check(inferos_rewind(cache, PROMPT + DECODE - 1), "rewind");
  step(cache, PROMPT + DECODE - 1, 1, again);
  double difference = 0.0;
  for (int i = 0; i < HEADS * HEAD_DIM; ++i) difference = fmax(difference, fabs((double)first[i] - again[i]));

  inferos_stats stats;
  check(inferos_get_stats(cache, &stats), "get_stats");
  uint64_t bytes = stats.bytes[INFEROS_F16] + stats.bytes[INFEROS_K8V4];
  double fp16 = 2.0 * 2.0 * LAYERS * KV_HEADS * HEAD_DIM * (double)stats.tokens;
  printf("tokens %lld\n", (long long)stats.tokens);
  printf("k8v4 blocks %llu\n", (unsigned long long)stats.blocks[INFEROS_K8V4]);
  printf("of FP16 %.3f\n", (double)bytes / fp16);
  printf("difference after rewind %g\n", difference);

  inferos_status refused = inferos_begin(cache, 1 << 20);
  printf("a step of 2^20 tokens: %s\n", refused == INFEROS_BUDGET ? "over the budget" : "?");
  int64_t length;
  check(inferos_length(cache, &length), "length");
  printf("tokens held %lld\n", (long long)length);
  check(inferos_close(cache), "close");
  inferos_arena_destroy(arena);
  return 0;
}
