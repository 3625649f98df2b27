#include "../../launchers/norm_linear_argmax.h"
#include "by_shapes.h"

BY_SHAPES(norm_linear_argmax, (const NormLinearArgmaxArgs& a), (a))
