"""The options of the verbs whose modules import torch. They stand here so that help and completion do not
wait for torch.

Each function adds the options of one verb to an argparse parser; `lab.cli` and the verb's own module call it.
"""

import argparse
from pathlib import Path

from lab import declared
from lab.arguments import duration, gibibytes, seconds
from lab.inspect.gpu import GPUS

DTYPES = ("fp32", "fp16", "bf16")  # the names of lab.contract.DTYPES; a test compares them


WHAT_A_FILE_CONTAINS = """\
what FILE must contain:
  FILE.cu  the launcher that cuda_src/launchers/OP.h declares, such as
             void silu_mul(const SiluMulArgs& a)
           with a.gate_up, a.y, a.rows, a.cols, a.dtype and a.stream, and the kernels that it launches.
           Include "common.cuh" and "launchers/OP.h". Kernels are launched by
           launch({grid, block, bytes of dynamic shared memory, stream}, "name", kernel, arguments...),
           not by <<<>>>, and shared memory is auto& shared = lab::smem<Struct>(), not __shared__, so that
           they run on a CPU too.
           dtype: 0 float32, 1 float16, 2 bfloat16.
  FILE.py  a function with the name and the arguments of that in triton_kernels/OP.py, such as
             def silu_mul(gate_up, y)
           and the @triton.jit kernels that it launches by kernel[grid](...), with @triton.autotune if you
           like.
A copy of the op's kernel is a good start: lab new kernel OP. The file is loaded by a process of its own:
a kernel that crashes, exits or does not end is a failed case. docs/judge.md says how a kernel is judged.
"""


def ops(parser):
    parser.add_argument("--json", action="store_true", help="as JSON")


def check(parser):
    parser.add_argument("--op", action="append", help="only this op (repeatable); default: all")
    parser.add_argument(
        "--backend", help="backends, separated by commas; default: all that this machine can run"
    )
    parser.add_argument(
        "--dtype", help=f"{', '.join(DTYPES)}, separated by commas; default: all that the op takes"
    )
    parser.add_argument("--device", default=None, help="cuda or cpu; default: cuda where there is a GPU")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the first two cases of every op, or rung, and one of each format",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random inputs")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=300.0,
        metavar="SECONDS",
        help="time limit of a case; then the process of its kernel is ended (default 300)",
    )
    parser.add_argument(
        "--ladder",
        action="store_true",
        help="the rungs of the ladders instead of the ops; --op then names a ladder, as in quantised_linear",
    )


def weight_formats(parser):
    parser.add_argument(
        "--weights-as",
        metavar="HOW",
        help="stored: quantised weights stay in the format of their file (the default on a GPU); fp32, fp16 "
        "or bf16: expanded to that dtype (the default on a CPU: expanded to the model's dtype)",
    )
    parser.add_argument(
        "--quantise",
        metavar="FORMAT",
        help="round float weights to a weight format, as int8, int4-g128 or fp8 (an unknown name lists all)",
    )
    parser.add_argument(
        "--quantise-head",
        metavar="FORMAT",
        help="with --quantise, the format of the output head and of a tied embedding, or none (default int8)",
    )


def kv_dtype(parser):
    parser.add_argument(
        "--kv-dtype",
        metavar="FORMAT",
        help="of the KV cache: auto (the model's dtype, the default), fp8 or int8",
    )


def model_arguments(parser):
    """Which model runs, and under what; for verbs that decode."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default="smollm2-135m",
        help="a preset, a GGUF file or a Hugging Face folder (default: smollm2-135m)",
    )
    parser.add_argument("--backend", metavar="NAME", help="cuda, triton or torch (default: LAB_BACKEND)")
    parser.add_argument(
        "--override",
        metavar="OP=BACKEND",
        action="append",
        default=[],
        help="another backend for one op; may be repeated",
    )
    parser.add_argument(
        "--plan",
        default="basic",
        help="basic: one kernel for each op; fused: five for each layer; persistent: one for the whole step",
    )
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is a GPU)")
    parser.add_argument("--dtype", help="fp32, fp16 or bf16 (default: fp32 on the CPU, bf16 on a GPU)")
    parser.add_argument(
        "--weights", metavar="SOURCE", default="auto", help="auto: those of the model; random: only its shape"
    )
    weight_formats(parser)
    kv_dtype(parser)
    parser.add_argument(
        "--max-context", metavar="N", type=int, help="size of the KV cache in tokens (default: as needed)"
    )
    parser.add_argument(
        "--page-size", metavar="N", type=int, default=16, help="tokens of a KV-cache page, 16 to 256"
    )
    parser.add_argument(
        "--eager", action="store_true", help="on a GPU, launch op by op instead of a CUDA graph"
    )


def sampling_arguments(parser):
    """How tokens are chosen (lab/model/sampling.py)."""
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 is greedy (the default)"
    )
    parser.add_argument("--top-k", metavar="K", type=int, default=0, help="0 keeps every token")
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0, help="1 keeps every token")
    parser.add_argument(
        "--min-p", metavar="P", type=float, default=0.0, help="of the likeliest token's probability; 0: all"
    )
    parser.add_argument(
        "--repetition-penalty", metavar="R", type=float, default=1.0, help="1 changes nothing"
    )
    parser.add_argument("--presence-penalty", metavar="P", type=float, default=0.0)
    parser.add_argument("--frequency-penalty", metavar="P", type=float, default=0.0)
    parser.add_argument(
        "--logit-bias",
        metavar="ID=NUMBER",
        action="append",
        default=[],
        help="added to the logit of a token; may be repeated",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0)


def bench(parser):
    parser.add_argument(
        "what",
        nargs="?",
        default="all",
        choices=("ops", "model", "serving", "accuracy", "ledger", "all", "crossover", "exchange"),
        help="what to measure (default: all); serving: many sequences in the queue, by batch; "
        "accuracy: what weight formats cost a model with real weights; "
        "crossover: which backend is faster at which size, from the "
        "records in --out; exchange: what several GPUs pass to each other",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="ops (for ops), presets (for model, serving, ledger, crossover), or presets, GGUF files and "
        "folders (for accuracy); default: all ops, four presets, smollm2-135m",
    )
    parser.add_argument(
        "--out", metavar="DIR", default="out/bench", help="folder of records.jsonl (default out/bench)"
    )
    parser.add_argument("--backend", metavar="A,B", help="default: all that this machine can run")
    parser.add_argument(
        "--dtype", metavar="A,B", help="fp32, fp16, bf16 (default: bf16, and the others at fewer sizes)"
    )
    parser.add_argument("--model", metavar="A,B", help="presets; the ops are measured at their shapes")
    parser.add_argument("--batch", metavar="N,N", help="batch sizes")
    parser.add_argument("--context", metavar="N,N", help="tokens in the KV cache")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument(
        "--plan",
        metavar="A,B",
        help="decode plans of the models (default: all, persistent at batch 1 only; on a CPU basic)",
    )
    parser.add_argument(
        "--weights",
        choices=("random", "auto"),
        default="random",
        help="weights of the models: random ones, or with auto the real ones",
    )
    weight_formats(parser)
    parser.add_argument(
        "--weight-format",
        metavar="A,B",
        help="weight formats, one after the other, and none for plain weights: for ops those that have "
        "weights, for model and accuracy the models rounded to each (accuracy: one of each kind by default)",
    )
    kv_dtype(parser)
    parser.add_argument(
        "--tensor-parallel",
        metavar="N,N",
        help="numbers of GPUs: for model those that divide it (default: one), for exchange one number (2)",
    )
    parser.add_argument("--quick", action="store_true", help="a small set in under 2 minutes of GPU time")
    parser.add_argument(
        "--seconds", type=duration, metavar="S", help="sampling time per configuration and timer"
    )
    parser.add_argument(
        "--budget-minutes",
        type=duration,
        metavar="M",
        help="stop cleanly after M minutes; run again to resume",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="begin a new run even if a stopped one could be resumed"
    )
    parser.add_argument(
        "--no-vendor", action="store_true", help="do not measure cuBLAS, SDPA, cuDNN and other peers"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="do not measure the models under torch.compile"
    )
    parser.add_argument(
        "--swap",
        action="store_true",
        help="for ledger: also a token with each op in turn from the other backend (always part of `all`)",
    )
    parser.add_argument(
        "--ladder", action="store_true", help="for ops: the rungs of the ladders, at one size each"
    )
    parser.add_argument(
        "--export",
        metavar="FILE",
        help="for crossover: write the faster backends as a table for lab run --dispatch",
    )


def ledger(parser):
    parser.add_argument("model", metavar="MODEL", help="a preset")
    parser.add_argument("--backend", metavar="A,B", help="default: cuda,triton,torch")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16")
    parser.add_argument("--batch", type=int, default=1, help="batch size (default 1)")
    parser.add_argument("--context", type=int, default=1024, help="tokens in the KV cache (default 1024)")
    parser.add_argument(
        "--weights", choices=("random", "auto"), default="random", help="random, or auto: the real ones"
    )
    weight_formats(parser)
    kv_dtype(parser)
    parser.add_argument(
        "--swap",
        action="store_true",
        help="also tokens all in CUDA, all in Triton, and with each op in turn swapped",
    )
    parser.add_argument(
        "--inside",
        action="store_true",
        help="instead: when the blocks of the persistent plan's kernel wait and when they multiply, phase by "
        "phase (CUDA on a GPU compiles a kernel that records this, once, in minutes)",
    )
    parser.add_argument(
        "--plan", metavar="A,B", help="decode plans (default: all, persistent at batch 1 only)"
    )
    parser.add_argument(
        "--tensor-parallel",
        metavar="N",
        type=int,
        default=1,
        help="divide the model among N GPUs (on a CPU: N processes, whose times say nothing about GPUs)",
    )
    parser.add_argument(
        "--out", metavar="DIR", default="out/ledger", help="folder of records.jsonl (default out/ledger)"
    )


def tune(parser):
    tunable = [name for name in declared.names() if declared.spaces(name)]
    parser.add_argument("op", metavar="OP", nargs="+", help=f"{', '.join(tunable)}, or all")
    parser.add_argument(
        "--backend", default="cuda,triton", metavar="A,B", help="languages to tune (default cuda,triton)"
    )
    parser.add_argument(
        "--model", metavar="A,B", help="presets whose shapes to tune (default: the four of the benchmark)"
    )
    parser.add_argument("--batch", default="1,4,16,64", metavar="N,N", help="batch sizes (default 1,4,16,64)")
    parser.add_argument(
        "--context",
        default="8192",
        metavar="N,N",
        help="contexts of the attention ops, which share an entry (default 8192)",
    )
    parser.add_argument(
        "--weight-format",
        metavar="A,B",
        help="tune for weights in these formats instead of plain ones (in Triton)",
    )
    parser.add_argument("--dtype", default="bf16", help="bf16 (default; fp16 shares its settings) or fp32")
    parser.add_argument(
        "--tries",
        type=int,
        default=40,
        metavar="N",
        help="how many settings to try for a shape, at most (default 40)",
    )
    parser.add_argument(
        "--budget-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="stop cleanly after S seconds; run again to resume (default 600)",
    )
    parser.add_argument(
        "--by-token",
        action="store_true",
        help="compare settings by the time of a whole decode step (plan fused, context of --context tokens), "
        "not by that of the kernel alone",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="also tune the shapes that the table already has from this GPU and compiler",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="write DIR/cuda/sm_NN.json and DIR/triton/sm_NN.json (default: the "
        "tables that launchers read, cuda_src/tuned/ and triton_kernels/tuned/)",
    )


def inspect(parser):
    parser.add_argument("op", metavar="OP", nargs="?", help="an op; `lab ops` lists them")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)}; default: bf16, or what the op takes")
    parser.add_argument("--arch", default="sm_90a", help=f"{', '.join(GPUS)}; default: sm_90a")
    parser.add_argument("--case", type=int, metavar="N", help="sizes of the contract's case N, from 0")
    parser.add_argument(
        "--sizes",
        nargs="+",
        metavar="NAME=N",
        help="sizes of the call, as in batch=16 n=6144 k=4096 "
        "or lengths=1024,2048; sizes that are left out are those of a decode step of Llama 3.1 8B, batch 1",
    )
    parser.add_argument("--weight-format", metavar="FORMAT", help="weights in this format; default: plain")
    parser.add_argument("--backend", help="cuda or triton; default: both")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--sass",
        action="store_const",
        dest="listing",
        const="sass",
        help="print the machine code, with the source lines",
    )
    form.add_argument(
        "--ptx", action="store_const", dest="listing", const="ptx", help="print PTX, with the source lines"
    )
    form.add_argument(
        "--ttgir",
        action="store_const",
        dest="listing",
        const="ttgir",
        help="print Triton's intermediate code for GPUs",
    )
    form.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument(
        "--all", action="store_true", help="write fairness cards of every op and dtype to --out DIR"
    )
    parser.add_argument("--out", metavar="DIR", help="with --all: append the cards to DIR/records.jsonl")


def judge_limits(parser):
    """The seed of the judge's contents, and what a kernel's process may take."""
    parser.add_argument(
        "--seed", type=int, help="seed of the random inputs; default: a new one, which a failure names"
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=120.0,
        metavar="SECONDS",
        help="time limit for compiling the file, for loading it, for each case and each step of the race "
        "(default 120)",
    )
    parser.add_argument(
        "--memory",
        type=gibibytes,
        default=16.0,
        metavar="GIB",
        help="how much memory of the host compiling the file may take, and then the kernel's process "
        "(default 16)",
    )


def try_(parser):
    parser.epilog, parser.formatter_class = WHAT_A_FILE_CONTAINS, argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, metavar="FILE", help="a .cu file (CUDA) or a .py file (Triton)")
    parser.add_argument("--op", required=True, help="the op that the file implements")
    parser.add_argument(
        "--dtype", help=f"{', '.join(DTYPES)}, separated by commas; default: all that the op takes"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    judge_limits(parser)
    parser.add_argument(
        "--check-only", action="store_true", help="check the kernel, but do not measure it on a GPU"
    )
    parser.add_argument(
        "--model",
        default="llama-3.2-1b",
        metavar="A,B",
        help="presets; the kernel is measured at their shapes",
    )
    parser.add_argument(
        "--batch", default="1,16", metavar="N,N", help="batch sizes to measure at (default 1,16)"
    )
    parser.add_argument("--context", default="1024,8192", metavar="N,N", help="tokens in the KV cache")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the records and the report (default out/try/FILE)"
    )


def export(parser):
    parser.add_argument("op", nargs="*", metavar="OP", help="ops; default: all, with why some have none")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder, laid out as a dataset")
    parser.add_argument(
        "--model", default="llama-3.2-1b", metavar="A,B", help="presets, whose sizes are written"
    )
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="of all tensors (default bf16)")
    parser.add_argument("--batch", default="1,16,64", metavar="N,N", help="of workloads (default 1,16,64)")
    parser.add_argument(
        "--context", default="1024,8192", metavar="N,N", help="tokens in the KV cache (default 1024,8192)"
    )
    parser.add_argument(
        "--records", metavar="DIR", help="of a bench: what it measured on a GPU is written as traces"
    )


def import_(parser):
    parser.add_argument("path", metavar="DIR|FILE", help="a dataset, or a .json or .jsonl file of one")
    parser.add_argument("--solution", action="append", metavar="NAME", help="only this one (repeatable)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    judge_limits(parser)
    parser.add_argument(
        "--check-only", action="store_true", help="judge the solutions, but do not race them on a GPU"
    )
    parser.add_argument(
        "--batch", default="1,16", metavar="N,N", help="batch sizes to race at (default 1,16)"
    )
    parser.add_argument(
        "--context", default="1024,8192", metavar="N,N", help="tokens in the KV cache (default 1024,8192)"
    )
    parser.add_argument(
        "--out",
        default="out/import",
        metavar="DIR",
        help="folder with one of records and a report for each solution that is raced (default out/import)",
    )


def new(parser):
    parser.add_argument(
        "words",
        nargs="+",
        metavar="[kernel] OP",
        help="OP: the name of a new op; kernel OP: an op whose kernel is copied to a file of yours",
    )
    parser.add_argument(
        "--language", choices=("cuda", "triton"), help="of the kernel that is copied (default triton)"
    )
    parser.add_argument("--out", metavar="FILE", help="the copy (default my_OP.py or my_OP.cu)")


OF = {
    "ops": ops,
    "check": check,
    "bench": bench,
    "ledger": ledger,
    "tune": tune,
    "inspect": inspect,
    "try": try_,
    "new": new,
    "export": export,
    "import": import_,
}
