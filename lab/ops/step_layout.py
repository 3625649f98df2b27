"""Constants that the contract of decode_step and its two kernels share: the order of a layer's tensors, the
meaning of the counters, and what a kernel records about itself where it is asked to."""

MAX_GROUP = 8  # query heads of a KV head
MAX_SPLITS = 64  # blocks that share a KV head's context
# Indices in `counters`: BEST takes 64 bits; from TICKETS on, each KV head has a ticket. Only CUDA uses TAG,
# only Triton BARRIER and TICKETS.
BEST, TICKET, TAG, BARRIER, TICKETS = 0, 2, 3, 4, 8
# A layer's tensors, in the order of a row of StepModel.table.
LAYER = ("attn_norm", "wqkv", "bqkv", "q_norm", "k_norm", "wo", "bo", "mlp_norm", "w_gate_up", "w_down")
# With packed weights a row continues with the scales of these four, and with their formats' numbers: that of
# matrix i in byte i.
MATRICES = ("wqkv", "wo", "w_gate_up", "w_down")
# If a format has scales for spans of several segments, or a layer's q, k and v have formats of their own, a
# row continues with the addresses of these two, and with those of their scales. In a layer that stores q, k
# and v apart, wqkv is q's, and the formats of these two are in the bytes that follow those of MATRICES; in
# other layers all of this is 0.
APART = ("wk", "wv")
OPTIONAL = ("bqkv", "q_norm", "k_norm", "bo")
# A trace (`lab ledger --inside`) is int64 [TRACE_BLOCKS, trace_rows(layers), 4], zero before the launch. Row
# 0 of a block has its multiprocessor's clock and the global timer, in ns, when the block began, and the two
# when it ended. Each other row is of a phase: START, the PHASES of every layer, LM_HEAD, END. Column 0 is the
# clock when the phase ended; it began where the one before ended. CUDA: column 1 is how much of it the block
# waited for other blocks, column 2 how much for tiles of weights, column 3 how many tiles were issued and not
# yet multiplied when it could begin, or -1. Triton: column 1 is the clock when the wait for other blocks was
# over, or 0.
TRACE_BLOCKS = 1024
START, PHASES, LM_HEAD, END = "start", ("qkv", "attention", "o", "gate_up", "down"), "lm_head", "end"


def trace_rows(layers):
    return len(PHASES) * layers + 4
