/* Counts the calls to Python's allocators. Loaded by allocations.py with ctypes.PyDLL; no headers of Python needed. */

#include <stddef.h>

typedef struct {
  void* context;
  void* (*malloc)(void* context, size_t bytes);
  void* (*calloc)(void* context, size_t count, size_t bytes);
  void* (*realloc)(void* context, void* block, size_t bytes);
  void (*free)(void* context, void* block);
} Allocator; /* PyMemAllocatorEx */

enum { kDomains = 3 }; /* raw, mem, object */

extern void PyMem_GetAllocator(int domain, Allocator* allocator);
extern void PyMem_SetAllocator(int domain, Allocator* allocator);

static Allocator originals[kDomains];
static long calls;
/* A large block of the object domain comes from the raw one: one call, not two. */
static _Thread_local int inside;

static void* count_malloc(void* context, size_t bytes) {
  const Allocator* original = context;
  calls += !inside++;
  void* result = original->malloc(original->context, bytes);
  --inside;
  return result;
}

static void* count_calloc(void* context, size_t count, size_t bytes) {
  const Allocator* original = context;
  calls += !inside++;
  void* result = original->calloc(original->context, count, bytes);
  --inside;
  return result;
}

static void* count_realloc(void* context, void* block, size_t bytes) {
  const Allocator* original = context;
  calls += !inside++;
  void* result = original->realloc(original->context, block, bytes);
  --inside;
  return result;
}

static void pass_free(void* context, void* block) {
  const Allocator* original = context;
  original->free(original->context, block);
}

void start(void) {
  calls = 0;
  for (int domain = 0; domain < kDomains; ++domain) {
    Allocator counting = {&originals[domain], count_malloc, count_calloc, count_realloc, pass_free};
    PyMem_GetAllocator(domain, &originals[domain]);
    PyMem_SetAllocator(domain, &counting);
  }
}

/* The calls since start, of all domains; the allocators are Python's own again. */
long stop(void) {
  for (int domain = 0; domain < kDomains; ++domain) PyMem_SetAllocator(domain, &originals[domain]);
  return calls;
}
