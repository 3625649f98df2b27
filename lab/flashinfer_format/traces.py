"""Measured rows of records.jsonl as Traces, and what a foreign Trace says, as one line.

A Trace of ours has what was measured and nothing else. The errors of a row are not in the records, so they
are NaN; the definition's reference was not timed, so its latency and the speedup are 0, the format's own
default.
"""

from __future__ import annotations

import math

from lab.errors import LabError, named
from lab.flashinfer_format import written, written_cuda
from lab.flashinfer_format.schema import Correctness, Environment, Evaluation, Performance, Trace
from lab.records import schema as records

BACKENDS = ("cuda", "triton")


def measured_rows(where) -> list[tuple]:
    """(row, the env row of its run) of each measurement of our kernels on a GPU, with caches emptied before
    each call. Raises LabError where there is none."""
    rows = records.read(where).rows
    machines = {row.run: row for row in rows if row.kind == "env" and row.when == "before"}
    found = [
        (row, machines[row.run])
        for row in rows
        if row.kind == "op"
        and row.backend in BACKENDS
        and row.us
        and (row.cache, row.timer) == ("cold", "graph")
        and not (row.emulated or row.error or row.flag or row.weight_format or row.kv_dtype)
        and row.rung is None
        and row.run in machines
        and machines[row.run].device == "cuda"
    ]
    if not found:
        raise LabError(f"{where}: no row of our kernels that was measured on a GPU")
    return found


def of_rows(subject, dtype: str, measured) -> list[tuple[Trace, dict]]:
    """(a trace, the tensors of the file that its workload names) for each backend and size of a definition:
    of several rows the last."""
    found = {}
    for row, machine in measured:
        if row.dtype == dtype and subject.name in (one.name for one in subjects_of(row)):
            found[row.backend, row.batch, row.context] = trace_of(subject, row, machine)
    return list(found.values())


def subjects_of(row) -> list:
    """The definitions that say what a row measured: none, or one."""
    shape = row.shape
    if row.op == "linear" and set(shape) == {"n", "k"}:
        return [written.subject_of("gemm_n{N}_k{K}", N=shape["n"], K=shape["k"])]
    if row.op == "rmsnorm" and set(shape) <= {"cols", "residual"} and "cols" in shape:
        kind = "fused_add_rmsnorm" if shape.get("residual") else "rmsnorm"
        return [written.subject_of(kind + "_h{hidden_size}", hidden_size=shape["cols"])]
    if row.op == "decode_attention" and {"q_heads", "kv_heads", "head_dim", "page_size"} <= set(shape):
        return [written.attention(**shape)]
    return []


def trace_of(subject, row, machine) -> tuple[Trace, dict]:
    workload, tensors = written.workload_of(subject, row.batch, row.context)
    note = "the op alone, in a CUDA graph, with caches emptied before each replay; errors and the reference "
    note += "were not measured"
    if row.op == "decode_attention" or subject.family.name.startswith("fused"):
        note += "; what main converts is not in this time"
    if row.backend == "cuda" and subject.family.name not in written_cuda.BODIES:
        note += f"; the sources are cuda_src/{row.op}.cu, of which there is no solution"
    elif row.backend == "cuda":
        note += "; with tuned settings and code for sm_90a, which the solution's sources lack"
    libs = {
        "torch": machine.torch,
        "triton": machine.triton,
        "cuda": machine.cuda,
        written.AUTHOR: machine.commit,
    }
    evaluation = Evaluation(
        "PASSED",
        Environment(
            (machine.gpu or "cuda").replace(" ", "_"), {k: v for k, v in libs.items() if v is not None}
        ),
        machine.time or "unknown",
        log=note,
        correctness=Correctness(math.nan, math.nan),
        performance=Performance(latency_ms=row.us / 1e3),
    )
    name = written.solution_name(row.backend, subject.name)
    return Trace(subject.name, workload, name, evaluation), tensors


def line_of(trace: Trace) -> str:
    """A foreign trace for the terminal. Its time was measured by others, so it stands beside none of ours."""
    axes = " ".join(f"{named(axis)}={value}" for axis, value in trace.workload.axes.items())
    text = f"foreign: {named(trace.definition)} {axes} {named(str(trace.solution))}: "
    evaluation = trace.evaluation
    if evaluation is None:
        return text + "no evaluation"
    text += evaluation.status
    if evaluation.performance is not None:
        text += f", {evaluation.performance.latency_ms * 1e3:.4g} us"
    return text + f" on {named(evaluation.environment.hardware)}, as the file says"
