"""`make demo`: a real model answers one prompt under CUDA, Triton and torch, and the answers are compared.

The three share weights, prompt, prefill and plan, in fp32; only the kernels of the decode step differ. Exit
status 1 if a token differs. The measurements go to OUT/records.jsonl, and a report of them is drawn beside
it.
"""

import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from lab import cli
from lab.errors import one_line

MODEL = "smollm2-135m"
PROMPT = "What is the capital of France?"
TOKENS = 32  # at most; the answer is usually shorter
LEAST = 4  # tokens that every backend decodes, even on a slow machine


@dataclass
class Answer:
    """The answer of one backend. ids ends with the stop token unless the time ran out; ms has the time of
    each token."""

    backend: str
    ids: list = field(default_factory=list)
    ms: list = field(default_factory=list)
    launches: int = 0  # kernels that the trace counted
    complete: bool = False  # whether it ended with a stop token or at TOKENS


def decode(backend, weights, prompt, stop_ids, seconds, on_token):
    """Greedy decoding of `prompt` under one backend, for about `seconds` and at least LEAST tokens."""
    from lab import dispatch, ops
    from lab.model.decoder import Decoder

    trace = dispatch.Trace()
    everywhere = {op.name: backend for op in ops.OPS}  # so that LAB_OVERRIDE has no effect
    bound = dispatch.select(backend, weights.device, everywhere, trace)
    decoder = Decoder(weights, bound, max_context=len(prompt) + TOKENS)
    decoder.prepare()
    decoder.admit(0, prompt)
    answer, began = Answer(backend), time.perf_counter()
    while len(answer.ids) < TOKENS:
        started = time.perf_counter()
        token = int(decoder.step()[0])  # waits for the device
        answer.ms.append((time.perf_counter() - started) * 1e3)
        answer.ids.append(token)
        on_token(token)
        answer.complete = token in stop_ids or len(answer.ids) == TOKENS
        late = time.perf_counter() - began + answer.ms[-1] / 1e3 > seconds
        if answer.complete or late and len(answer.ids) >= LEAST:
            break
    foreign = {name for _, name, _ in trace.counts if name != backend}
    assert not foreign, f"kernels of {foreign} ran under {backend}"
    answer.launches = sum(trace.counts.values())
    return answer


def first_difference(a, b):
    """The index of the first token that differs among those that both have decoded; None if they agree."""
    return next((i for i, (x, y) in enumerate(zip(a.ids, b.ids)) if x != y), None)


def show(answers, tokenizer):
    """Prints the comparison. Returns whether all answers agree."""
    print(f"\n{'backend':<8} {'tokens':>6} {'median ms':>10} {'launches':>12}  ids")
    for a in answers:
        print(
            f"{a.backend:<8} {len(a.ids):>6} {statistics.median(a.ms):>10.1f} {a.launches:>12}  "
            f"{' '.join(map(str, a.ids))}{'' if a.complete else ' ... (out of time)'}"
        )
    agree = True
    for i, a in enumerate(answers):
        for b in answers[i + 1 :]:
            at, common = first_difference(a, b), min(len(a.ids), len(b.ids))
            if at is None:
                print(f"{a.backend} and {b.backend}: the same {common} tokens")
            else:
                agree = False
                print(
                    f"{a.backend} and {b.backend}: DIFFER at token {at + 1}: "
                    f"{tokenizer.decode([a.ids[at]])!r} against {tokenizer.decode([b.ids[at]])!r}"
                )
    return agree


def main(argv):
    parser = cli.Parser(prog="make demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="out/demo", help="folder of the records and the report")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument(
        "--seconds", type=float, default=90, help="time limit of the slowest backend (default 90)"
    )
    args = parser.parse_args(argv)
    Path(args.out).mkdir(parents=True, exist_ok=True)  # fails now rather than after minutes of work

    import torch

    from lab.model.sources import open_source
    from lab.model.weight_formats import EXPANDED, storage_of
    from lab.model.weights import load

    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = open_source(MODEL)
    tokenizer = source.tokenizer()
    loaded = load(source, torch.float32, device, storage_of(device=device))
    # torch has no product for packed weights. The same numbers, expanded, are a reference of another kind.
    packed = loaded.formats != "fp32"
    expanded = load(source, torch.float32, device, EXPANDED) if packed else loaded
    prompt = tokenizer.encode_chat([{"role": "user", "content": args.prompt}])
    where = f"the GPU {torch.cuda.get_device_name()}" if device == "cuda" else "the CPU"
    dtype = f"fp32, weights {loaded.formats}" if packed else "fp32"
    print(f"{MODEL}, {dtype}, on {where}; prompt of {len(prompt)} tokens: {args.prompt}")
    how = {
        "torch": "the reference, weights expanded" if packed else "the reference",
        "cuda": "our CUDA kernels",
        "triton": "our Triton kernels",
    }
    if device == "cpu":
        how["cuda"] += ", compiled by g++ and emulated"
        how["triton"] += ", interpreted: seconds a token"
    answers = []
    for backend in ("torch", "cuda", "triton"):
        print(f"\n[{backend}] {how[backend]}\n  ", end="", flush=True)
        stream = tokenizer.stream()
        answers.append(
            decode(
                backend,
                expanded if backend == "torch" else loaded,
                prompt,
                tokenizer.eos,
                args.seconds,
                lambda token: print(stream.push(token), end="", flush=True),
            )
        )
        print(stream.finish())
    agree = show(answers, tokenizer)
    if agree:
        print("All three agree token for token.")
    else:
        print("The backends DISAGREE, which is a fault: `lab check` shows which op is wrong.")
    return max(report(args.out), 0 if agree else 1)


def report(out):
    """Measures the ops and a decode step of this model briefly, and draws the measurements. Returns the exit
    status."""
    print("\nMeasuring every op and a whole decode step, briefly ...", flush=True)
    from lab.harness import bench
    from lab.harness.request import Request
    from lab.report import build

    status = bench.measure(Request("all", out, models=(MODEL,), weights="auto", quick=True, fresh=True))
    status = status or build.report(out)
    if status == 0:
        print(
            "\nNext: `.venv/bin/lab learn`, the course; `make report`, the same page for an H100: "
            "reports/h100/index.html"
        )
    return status


def run(argv):
    """Calls main(); prints a user's mistake as one line."""
    cli.take_any_text()
    try:
        return main(argv)
    except Exception as error:
        line = cli.explain(error) or (str(error) if isinstance(error, OSError) else None)
        if line is None:
            raise
        print(f"demo: error: {one_line(line)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
