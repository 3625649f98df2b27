// decode_step of a model that several GPUs divide: the kernel of decode_step.cu that also adds up sums over all
// ranks. It is a kernel of its own, because the code for that would slow the other one. On a CPU it does not
// exist: there the kernel of decode_step.cu does both.
#ifdef __CUDACC__
#define LAB_STEP_PART
#ifdef LAB_TRIED  // by lab try: its file stands in the place of decode_step.cu
#include LAB_TRIED
#else
#include "decode_step.cu"
#endif

void decode_step_of_a_rank(const DecodeStepArgs& a) { any_step<true>(a); }
#endif
