#include "../../launchers/norm_linear.h"
#include "by_shapes.h"

BY_SHAPES(norm_linear, (const NormLinearArgs& a), (a))
