"""What the contract of decode_step and its two kernels agree on: the order of a layer's tensors, the places
of counters."""

MAX_GROUP = 8  # query heads of a KV head
MAX_SPLITS = 64  # blocks that share a KV head's context
# Places in counters: BEST has 64 bits, each KV head a ticket. TAG is CUDA's, BARRIER and TICKETS are
# Triton's.
BEST, TICKET, TAG, BARRIER, TICKETS = 0, 2, 3, 4, 8
# A layer's tensors, in the order of a row of StepModel.table.
LAYER = ("attn_norm", "wqkv", "bqkv", "q_norm", "k_norm", "wo", "bo", "mlp_norm", "w_gate_up", "w_down")
OPTIONAL = ("bqkv", "q_norm", "k_norm", "bo")
