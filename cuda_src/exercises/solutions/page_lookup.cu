// Solution of page_lookup: reads a sequence's tokens, one number each, out of a paged cache.
//
// A tile of 32 tokens spans two pages of 16, but its page was looked up once, for its first token: the
// upper 16 lanes read the first page again. Each lane must look up the page of its own token. (If a page is
// never smaller than a tile, one lookup a tile is right, and cheaper; then the launcher must refuse smaller
// pages.)
#include "common.cuh"

using namespace lab;

__global__ void gather_kernel(const float* cache, const int* table, int length, int page_size, float* out) {
  for (int t0 = 0; t0 < length; t0 += 32) {
    const int t = t0 + threadIdx.x;
    if (t < length) out[t] = cache[table[t / page_size] * page_size + t % page_size];
  }
}
