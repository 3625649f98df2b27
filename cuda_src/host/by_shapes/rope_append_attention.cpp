#include "../../launchers/rope_append_attention.h"
#include "by_shapes.h"

BY_SHAPES(rope_append_attention, (const RopeAppendAttentionArgs& a), (a))
