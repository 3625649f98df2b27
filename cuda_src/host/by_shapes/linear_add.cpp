#include "../../launchers/linear_add.h"
#include "by_shapes.h"

BY_SHAPES(linear_add, (const LinearAddArgs& a), (a))
