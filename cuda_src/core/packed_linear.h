// linear's kernel for packed weights (formats/), as other ops launch it.
#pragma once
#include "../launchers/linear.h"

// linear with packed weights. residual: 0; or [rows, n] in x's dtype, which is added to the product (linear_add:
// y is the same memory).
void packed_linear(const LinearArgs& a, Ptr residual);
