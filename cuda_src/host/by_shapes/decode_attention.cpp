#include "../../launchers/decode_attention.h"
#include "by_shapes.h"

BY_SHAPES(decode_attention, (const DecodeAttentionArgs& a), (a))
