#include "../../launchers/norm_linear_silu_mul.h"
#include "by_shapes.h"

BY_SHAPES(norm_linear_silu_mul, (const NormLinearSiluMulArgs& a), (a))
