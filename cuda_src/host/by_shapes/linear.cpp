#include "../../launchers/linear.h"
#include "by_shapes.h"

BY_SHAPES(linear, (const LinearArgs& a), (a))
BY_SHAPES(packed_linear, (const LinearArgs& a, Ptr residual), (a, residual))
