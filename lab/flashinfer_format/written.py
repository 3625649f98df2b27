"""Our ops in the words of flashinfer-bench: definitions, workloads, and solutions that hold our kernels'
sources.

A solution is a file main.py, whose `run` has the definition's signature and converts its arguments, beside a
copy of the modules that the Triton kernel needs, with imports made relative.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

from lab.flashinfer_format.attention import HND, NHD
from lab.flashinfer_format.families import SPECIAL, TORCH, Family, family_of
from lab.flashinfer_format.schema import (
    AxisConst,
    AxisVar,
    BuildSpec,
    Definition,
    RandomInput,
    SafetensorsInput,
    ScalarInput,
    Solution,
    Source,
    TensorSpec,
    Workload,
)
from lab.own_modules import ROOT, reached, relative

AUTHOR = "decode-kernel-lab"
NAMES = {ours: theirs for theirs, ours in TORCH.items()}
HARDWARE = ["NVIDIA_H100", "NVIDIA_A100"]
EPS = 1e-6  # as in flashinfer-bench's own definitions of norms
NAMESPACE = uuid.UUID("6f1f2f0e-5a0b-4c58-9b0c-1d2a7c3f9e11")  # of the workloads' names

GEMM = """\
import torch


def run(A, B):
    return (A.float() @ B.float().T).to(A.dtype)
"""
NORM = f"""\
import torch

EPS = {EPS}


@torch.no_grad()
def run(ARGUMENTS):
    v = SUM.float()
    unit = (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + EPS)).to(weight.dtype)
    return (unit.float() * weight.float()).to(weight.dtype)
"""
DECODE = """\
import math

import torch


@torch.no_grad()
def run(q, k_cache, v_cache, kv_indptr, kv_indices, kv_last_page_len, sm_scale):
    batch, heads, head_dim = q.shape
    output = torch.zeros_like(q)
    lse = torch.full((batch, heads), -math.inf, dtype=torch.float32, device=q.device)
    for b in range(batch):
        pages = kv_indices[kv_indptr[b] : kv_indptr[b + 1]].long()
        if len(pages) == 0:
            continue
        k, v = (cache[pages]TO_NHD.flatten(0, 1).float() for cache in (k_cache, v_cache))
        tokens = len(k) - PAGE_SIZE + int(kv_last_page_len[b])
        k, v = (t[:tokens].repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("hd,lhd->hl", q[b].float(), k) * sm_scale
        lse[b] = torch.logsumexp(scores, dim=-1) / math.log(2)
        output[b] = torch.einsum("hl,lhd->hd", torch.softmax(scores, dim=-1), v).to(q.dtype)
    return output, lse
"""

MAIN_GEMM = '''\
"""C = A B^T by the Triton kernel `linear`, which takes at most 64 rows at a time."""

from .triton_kernels.linear import linear


def run(A, B, C):
    for row in range(0, A.shape[0], 64):
        linear(A[row : row + 64], B, None, C[row : row + 64])
'''
MAIN_NORM = f'''\
"""RMS norm by the Triton kernel `rmsnorm`."""

from .triton_kernels.rmsnorm import rmsnorm

EPS = {EPS}


def run(hidden_states, weight, output):
    rmsnorm(hidden_states, weight, EPS, None, output)
'''
MAIN_ADDED_NORM = f'''\
"""RMS norm of a sum by the Triton kernel `rmsnorm`, which stores the sum in the residual. Here that is an
input that must not change, so it is copied first; a model does not do that."""

from .triton_kernels.rmsnorm import rmsnorm

EPS = {EPS}


def run(hidden_states, residual, weight, output):
    rmsnorm(hidden_states, weight, EPS, residual.clone(), output)
'''
MAIN_DECODE = '''\
"""Paged decode attention by the Triton kernel `decode_attention`.

Sizes come from shapes alone, so that a call can be captured in a graph. The lists of pages become a table,
with room in each row for all pages; no more of a row than its sequence has is written or read. The kernel's
layout is HND: a cache in NHD is read as one with pages of one token. There are two splits or more, so that
the kernel stores the maximum and the sum of each split's exponentials, in base 2. The log-sum-exp is made of
these.
"""

import math

import torch
import triton
import triton.language as tl

from .triton_kernels.common import launch
from .triton_kernels.decode_attention import decode_attention

CONSTANTS


@triton.jit
def table_kernel(
    kv_indptr,
    kv_indices,
    kv_last_page_len,
    table,
    lengths,
    width,
    PAGE: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Row b of the table, with ENTRIES for each page of sequence b, and its length in tokens.
    b = tl.program_id(0)
    first = tl.load(kv_indptr + b)
    pages = tl.load(kv_indptr + b + 1) - first
    if tl.program_id(1) == 0:
        last = tl.load(kv_last_page_len + b)
        tl.store(lengths + b, tl.where(pages > 0, (pages - 1) * PAGE + last, 0))
    row = table + b.to(tl.int64) * width
    for begin in tl.range(tl.program_id(1) * BLOCK, pages * ENTRIES, tl.num_programs(1) * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        live = at < pages * ENTRIES
        page = tl.load(kv_indices + first + at // ENTRIES, mask=live, other=0)
        tl.store(row + at, page * ENTRIES + at % ENTRIES, mask=live)


@triton.jit
def lse_kernel(
    partial, lse, splits, GROUP: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr
):
    # log2 of the sum of exponentials of the heads of one sequence that share a KV head. The last two numbers
    # of a split's WIDTH are its maximum and its sum; the maximum is -inf where there was no token.
    at = tl.program_id(0).to(tl.int64)
    s, g = tl.arange(0, SPLITS)[:, None], tl.arange(0, HEADS)[None, :]
    live = (s < splits) & (g < GROUP)
    of_split = partial + ((at * splits + s) * GROUP + g) * WIDTH + WIDTH - 2
    top = tl.load(of_split, mask=live, other=float("-inf"))
    live = live & (top > float("-inf"))
    mass = tl.load(of_split + 1, mask=live, other=0.0)
    peak = tl.max(tl.where(live, top, -1.0e38), axis=0)
    total = tl.sum(tl.where(live, tl.exp2(top - peak[None, :]), 0.0) * mass, axis=0)
    some = total > 0.0
    result = tl.where(some, peak + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    g = tl.arange(0, HEADS)
    tl.store(lse + at * GROUP + g, result, mask=g < GROUP)


def run(q, k_cache, v_cache, kv_indptr, kv_indices, kv_last_page_len, sm_scale, output, lse):
    batch, heads, head_dim = q.shape
    if batch == 0:
        return
    kv_heads = k_cache.shape[2 if NHD else 1]
    if NHD:  # [pages, page_size, kv_heads, head_dim] is [tokens, kv_heads, 1, head_dim]: the same memory
        k_cache, v_cache = (cache.view(-1, kv_heads, 1, head_dim) for cache in (k_cache, v_cache))
    entries = PAGE_SIZE if NHD else 1  # of the table, for each page
    most = kv_indices.numel()  # pages of a sequence
    width = max(1, most * entries)
    table = torch.empty(batch, width, dtype=torch.int32, device=q.device)
    lengths = torch.empty(batch, dtype=torch.int32, device=q.device)
    programs = triton.cdiv(width, 1024 * batch)  # of a sequence; as many as one of average length needs
    launch(
        table_kernel, (batch, programs), kv_indptr, kv_indices, kv_last_page_len, table, lengths, width,
        PAGE=PAGE_SIZE, ENTRIES=entries, BLOCK=1024,
    )
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    fill = triton.cdiv(2 * processors, batch * kv_heads)
    splits = max(2, min(fill, triton.cdiv(most * PAGE_SIZE, 64)))
    group = heads // kv_heads
    partial = torch.full((batch, kv_heads, splits, group, head_dim + 2), -math.inf, device=q.device)
    tickets = torch.zeros(batch, kv_heads, dtype=torch.int32, device=q.device)
    decode_attention(
        q, k_cache, v_cache, table, lengths, float(sm_scale), splits, partial, tickets, output
    )
    launch(
        lse_kernel, (batch * kv_heads,), partial, lse, splits,
        GROUP=group, HEADS=triton.next_power_of_2(group), WIDTH=head_dim + 2,
        SPLITS=triton.next_power_of_2(splits),
    )
'''


@dataclass(frozen=True)
class Subject:
    """An op of ours at sizes that a definition has. sizes: the constants of the definition, by axis."""

    family: Family
    name: str
    sizes: dict
    layout: tuple = tuple(NHD)  # of the KV cache


def subjects(op, config) -> list[Subject]:
    """What a decode step of a model asks of an op, where a definition says the same."""
    found = []
    for _, sizes in op.uses(config):
        if op.name == "linear" and sizes.get("out_dtype") is None:
            found.append(subject_of("gemm_n{N}_k{K}", N=sizes["n"], K=sizes["k"]))
        elif op.name == "rmsnorm":
            found.append(subject_of("rmsnorm_h{hidden_size}", hidden_size=sizes["cols"]))
            if sizes.get("residual"):
                found.append(subject_of("fused_add_rmsnorm_h{hidden_size}", hidden_size=sizes["cols"]))
        elif op.name == "decode_attention":
            found.append(attention(**sizes))
    return found


def subject_of(pattern: str, **sizes) -> Subject:
    name = pattern.format(**sizes)
    return Subject(family_of(name), name, sizes)


def attention(q_heads: int, kv_heads: int, head_dim: int, page_size: int, **others) -> Subject:
    return subject_of(
        "gqa_paged_decode_h{num_qo_heads}_kv{num_kv_heads}_d{head_dim}_ps{page_size}",
        num_qo_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
    )


def definition_of(subject: Subject, dtype: str) -> Definition:
    """The definition of an op at its sizes. dtype: our name of it."""
    family, sizes, kind = subject.family, subject.sizes, NAMES[dtype]

    def specs(shapes):
        return {
            name: TensorSpec(
                list(subject.layout) if len(choices) > 1 else choices[0], SPECIAL.get(name, kind)
            )
            for name, choices in shapes.items()
        }

    inputs, outputs = specs(family.inputs), specs(family.outputs)
    axes = {name: AxisConst(value) for name, value in sizes.items()}
    for spec in (*inputs.values(), *outputs.values()):
        axes.update({axis: AxisVar() for axis in spec.shape or () if axis not in axes})
    return Definition(
        subject.name,
        family.op_type,
        axes,
        inputs,
        outputs,
        reference_of(subject),
        tags=["stage:decode", f"lab_op:{family.op}"],
        description=DESCRIPTIONS[family.name],
        constraints=list(family.constraints),
    )


DESCRIPTIONS = {
    "gemm_n*_k*": "C = A B^T, accumulated in float32 and rounded once.",
    "rmsnorm_h*": "RMS norm, rounded to the dtype before the weight and after it, as Hugging Face does.",
    "fused_add_rmsnorm_h*": "RMS norm of hidden_states + residual. The sum is rounded to the dtype, and so "
    "is the normalised sum before the weight, as in Hugging Face's Llama.",
    "gqa_paged_decode_h*_kv*_d*_ps*": "One new token of each sequence attends to a paged KV cache; lse is "
    "the base-2 logarithm of the sum of exponentials.",
}


def reference_of(subject: Subject) -> str:
    kind = subject.family.name
    if kind == "gemm_n*_k*":
        return GEMM
    if kind == "rmsnorm_h*":
        return NORM.replace("ARGUMENTS", "hidden_states, weight").replace("SUM", "hidden_states")
    if kind == "fused_add_rmsnorm_h*":
        return NORM.replace("ARGUMENTS", "hidden_states, residual, weight").replace(
            "SUM", "(hidden_states.float() + residual.float()).to(weight.dtype)"
        )
    transposed = ".transpose(1, 2)" if list(subject.layout) == HND else ""
    return DECODE.replace("TO_NHD", transposed).replace("PAGE_SIZE", str(subject.sizes["page_size"]))


def solution_of(subject: Subject, definition: Definition) -> Solution:
    """Our Triton kernel as a solution."""
    kernel = subject.family.op
    sources = [Source("main.py", main_of(subject))]
    for path in sorted(reached([f"triton_kernels.{kernel}"])):
        if text := relative(path):
            sources.append(Source(path.as_posix(), text))
    for path in sorted((ROOT / "triton_kernels/tuned").glob("*.json")):
        sources.append(Source(path.relative_to(ROOT).as_posix(), path.read_text()))
    return Solution(
        solution_name("triton", definition.name),
        definition.name,
        AUTHOR,
        BuildSpec("triton", HARDWARE, "main.py::run", ["torch", "triton"], destination_passing_style=True),
        sources,
        description=f"The kernel triton_kernels/{kernel}.py of the decode kernel lab, with what it imports.",
    )


def solution_name(backend: str, definition: str) -> str:
    return f"lab_{backend}_{definition}"


def main_of(subject: Subject) -> str:
    kind = subject.family.name
    simple = {"gemm_n*_k*": MAIN_GEMM, "rmsnorm_h*": MAIN_NORM, "fused_add_rmsnorm_h*": MAIN_ADDED_NORM}
    if kind in simple:
        return simple[kind]
    constants = f"PAGE_SIZE, NHD = {subject.sizes['page_size']}, {list(subject.layout) == NHD}"
    return MAIN_DECODE.replace("CONSTANTS", constants)


def workload_of(subject: Subject, batch: int, context: int | None) -> tuple[Workload, dict]:
    """(a workload, the tensors of the file that it names): sizes, with random contents. The lists of pages of
    attention are no random numbers: they are stored, each sequence with `context` tokens."""
    axes: dict = {"M": batch} if subject.family.op == "linear" else {"batch_size": batch}
    tensors: dict = {}
    if subject.family.op == "decode_attention":
        page = subject.sizes["page_size"]
        pages = -(-context // page)
        axes.update(num_pages=batch * pages, len_indptr=batch + 1, num_kv_indices=batch * pages)
        tensors = paged_lists(batch, pages, context - (pages - 1) * page)
    identity = str(uuid.uuid5(NAMESPACE, f"{subject.name} {batch} {context}"))
    path = blob_path(subject, identity).as_posix()
    inputs = {
        name: ScalarInput(subject.sizes["head_dim"] ** -0.5)
        if name == "sm_scale"
        else SafetensorsInput(path, name)
        if name in tensors
        else RandomInput()
        for name in subject.family.inputs
    }
    return Workload(axes, inputs, identity), tensors


def blob_path(subject: Subject, identity: str) -> Path:
    return Path("blob/workloads", subject.family.op_type, subject.name, f"{identity}.safetensors")


def paged_lists(batch: int, pages: int, last: int) -> dict:
    """Pages in a random order, as in a server that has run for long."""
    import torch

    order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    return {
        "kv_indptr": torch.arange(0, batch * pages + 1, pages, dtype=torch.int32),
        "kv_indices": order,
        "kv_last_page_len": torch.full((batch,), last, dtype=torch.int32),
    }
