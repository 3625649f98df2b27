// The kernels of decode_step_of_k_quants.cu with a KV cache in int8. One serves a model on one GPU and one that
// several divide, so that there are fewer to compile.
#ifdef __CUDACC__
#define LAB_STEP_PART
#ifdef LAB_TRIED  // by lab try: its file stands in the place of decode_step.cu
#include LAB_TRIED
#else
#include "decode_step.cu"
#endif

void decode_step_of_k_quants_int8(const DecodeStepArgs& a) { mixed_step<true, Int8Code>(a); }
#endif
