// decode_step with records of what each block waited for and when (core/step_trace.cuh). `lab ledger --inside`
// builds the GPU's extension with this file in the place of ../decode_step.cu. On a CPU the kernel of
// ../decode_step.cu can record by itself.
#define LAB_STEP_TRACE 1
#include "../decode_step.cu"
