// decode_step with a KV cache in fp8: the kernels of decode_step.cu for its codes, in a file of their own, which
// is compiled beside that one.
#define LAB_STEP_PART
#ifdef LAB_TRIED  // by lab try: its file stands in the place of decode_step.cu
#include LAB_TRIED
#else
#include "decode_step.cu"
#endif

void decode_step_of_fp8(const DecodeStepArgs& a) { step_of_codes<Fp8Code>(a); }
