// Every host entry point of the CUDA kernels: launchers/<op>.h declares the launcher of an op and its struct of
// arguments. A kernel includes its own alone, so that an op that is added compiles nothing else again.
#pragma once
#include "launchers/embedding.h"
#include "launchers/rmsnorm.h"
#include "launchers/linear.h"
#include "launchers/rope.h"
#include "launchers/kv_append.h"
#include "launchers/decode_attention.h"
#include "launchers/silu_mul.h"
#include "launchers/sample.h"
#include "launchers/norm_linear.h"
#include "launchers/norm_linear_silu_mul.h"
#include "launchers/linear_add.h"
#include "launchers/rope_append_attention.h"
#include "launchers/norm_linear_argmax.h"
#include "launchers/decode_step.h"
#include "launchers/bandwidth.h"
