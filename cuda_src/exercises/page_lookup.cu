// Exercise page_lookup: reads a sequence's tokens, one number each, out of a paged cache.
//
// Question: token t is number t % page_size of page table[t / page_size]. The result is right with pages of
// 32 and of 64 tokens. Which tokens come from the wrong page with pages of 16, and who must look the page
// up?
//
// Mend it here, then: lab exercise check page_lookup --language cuda
#include "common.cuh"

using namespace lab;

__global__ void gather_kernel(const float* cache, const int* table, int length, int page_size, float* out) {
  for (int t0 = 0; t0 < length; t0 += 32) {
    const int page = table[t0 / page_size];
    const int t = t0 + threadIdx.x;
    if (t < length) out[t] = cache[page * page_size + t % page_size];
  }
}
