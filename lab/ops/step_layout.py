"""Constants that the contract of decode_step and its two kernels share: the order of a layer's tensors, and
the meaning of the counters."""

MAX_GROUP = 8  # query heads of a KV head
MAX_SPLITS = 64  # blocks that share a KV head's context
# Indices in `counters`: BEST takes 64 bits; from TICKETS on, each KV head has a ticket. Only CUDA uses TAG,
# only Triton BARRIER and TICKETS.
BEST, TICKET, TAG, BARRIER, TICKETS = 0, 2, 3, 4, 8
# A layer's tensors, in the order of a row of StepModel.table.
LAYER = ("attn_norm", "wqkv", "bqkv", "q_norm", "k_norm", "wo", "bo", "mlp_norm", "w_gate_up", "w_down")
# With packed weights a row continues with the scales of these four, and ends with their formats' numbers:
# that of matrix i in byte i.
MATRICES = ("wqkv", "wo", "w_gate_up", "w_down")
OPTIONAL = ("bqkv", "q_norm", "k_norm", "bo")
