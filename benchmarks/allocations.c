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
static long counts[kDomains];

static void* count_malloc(void* context, size_t bytes) {
  const long domain = (Allocator*)context - originals;
  ++counts[domain];
  return originals[domain].malloc(originals[domain].context, bytes);
}

static void* count_calloc(void* context, size_t count, size_t bytes) {
  const long domain = (Allocator*)context - originals;
  ++counts[domain];
  return originals[domain].calloc(originals[domain].context, count, bytes);
}

static void* count_realloc(void* context, void* block, size_t bytes) {
  const long domain = (Allocator*)context - originals;
  ++counts[domain];
  return originals[domain].realloc(originals[domain].context, block, bytes);
}

static void pass_free(void* context, void* block) {
  const Allocator* original = (Allocator*)context;
  original->free(original->context, block);
}

void start(void) {
  for (int domain = 0; domain < kDomains; ++domain) {
    Allocator counting = {&originals[domain], count_malloc, count_calloc, count_realloc, pass_free};
    counts[domain] = 0;
    PyMem_GetAllocator(domain, &originals[domain]);
    PyMem_SetAllocator(domain, &counting);
  }
}

/* The calls since start, of all domains; the allocators are Python's own again. */
long stop(void) {
  long total = 0;
  for (int domain = 0; domain < kDomains; ++domain) {
    PyMem_SetAllocator(domain, &originals[domain]);
    total += counts[domain];
  }
  return total;
}
