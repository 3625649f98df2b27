// decode_step with weights in any formats, GGUF's K-quants among them: the kernels of decode_step.cu with
// Stored::mixed, in a file of their own, which is compiled beside that one. They are kernels of their own because the
// code for that would cost the others registers. On a CPU they do not exist: there the kernel of decode_step.cu takes
// all.
#ifdef __CUDACC__
#define LAB_STEP_PART
#ifdef LAB_TRIED  // by lab try: its file stands in the place of decode_step.cu
#include LAB_TRIED
#else
#include "decode_step.cu"
#endif

void decode_step_of_k_quants(const DecodeStepArgs& a) {
  a.peers.ranks > 1 ? mixed_step<true>(a) : mixed_step<false>(a);
}
#endif
