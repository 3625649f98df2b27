"""`lab run`: a prompt in, the model's text out as it comes, and what was measured as JSON."""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path

from lab.errors import LabError, shown, warn
from lab.files import write_whole
from lab.numbers import integer, number
from lab.options import model_arguments, sampling_arguments
from lab.text import columns, for_terminal

MAX_PROMPT = 1 << 24  # bytes of standard input; more than any model's context holds


def add_arguments(parser) -> None:
    model_arguments(parser)
    parser.add_argument(
        "--dispatch",
        metavar="FILE",
        help="a backend for each op by batch and context, as "
        "`lab bench crossover --export` writes it; --override goes first",
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt",
        metavar="TEXT",
        help="text; goes through the model's chat template if it has "
        "one; - reads it from standard input, up to a line break at its end",
    )
    prompt.add_argument("--ids", metavar="1,2,3", help="token ids instead of text")
    prompt.add_argument(
        "--batch-file",
        metavar="FILE",
        help='many prompts, a JSON object a line, as in {"prompt": "Hello", "temperature": 0.5}; the answers '
        "are JSON lines in the same order",
    )
    parser.add_argument(
        "--batch",
        metavar="N",
        type=int,
        help="with --batch-file: sequences that are decoded together (default 8)",
    )
    parser.add_argument(
        "--raw", action="store_true", help="feed texts as they are, without the chat template"
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=64)
    parser.add_argument("--ignore-eos", action="store_true", help="do not stop at the end-of-text token")
    sampling_arguments(parser)
    parser.add_argument(
        "--logprobs",
        metavar="N",
        type=int,
        help="with --json or --batch-file: log-probabilities, the token's own and those of the N likeliest",
    )
    parser.add_argument(
        "--tensor-parallel",
        metavar="N",
        type=int,
        default=1,
        help="divide the model among N GPUs (on a CPU: N processes); tokens are greedy",
    )
    parser.add_argument("--no-stream", action="store_true", help="print the text at the end only")
    parser.add_argument("--trace", action="store_true", help="list the kernels that ran, on standard error")
    parser.add_argument("--json", metavar="FILE", help="write ids, text, kernels and times to a file")


def main(args) -> int:
    from lab.dispatch import Trace, environment_overrides, parse_overrides, select
    from lab.dispatch_table import from_table, read_table
    from lab.model import ranks
    from lab.model.decoder import Decoder
    from lab.model.generate import generate
    from lab.model.opening import choice_of
    from lab.model.parallel import RankSource, check_ranks
    from lab.model.sampling import ONE_PART
    from lab.model.sources import open_source
    from lab.model.weights import load, require_parts

    # What costs nothing to check comes before what takes seconds.
    sampling = sampling_of(args)
    if args.batch_file is not None:
        from lab.model.batch_file import run_batch

        for option in ("dispatch", "json", "trace", "no_stream"):
            if getattr(args, option):
                raise LabError(f"--{option.replace('_', '-')} does not go with --batch-file")
        if args.tensor_parallel != 1:
            raise LabError("--tensor-parallel does not go with --batch-file")
        if args.max_new_tokens < 1:
            raise LabError(f"--max-new-tokens {args.max_new_tokens}: it must be at least 1")
        return run_batch(args, sampling)
    if args.batch is not None:
        raise LabError("--batch goes with --batch-file")
    if args.raw and args.ids is not None:
        raise LabError("--raw goes with texts, and --ids has none")
    if args.logprobs is not None and args.json is None:
        raise LabError("--logprobs goes with --json FILE or --batch-file, where they are written")
    if args.max_new_tokens < 1:
        raise LabError(f"--max-new-tokens {args.max_new_tokens}: it must be at least 1")
    if args.json is not None and not Path(args.json).absolute().parent.is_dir():
        raise LabError(f"--json {args.json}: its folder does not exist")
    if args.json is not None and Path(args.json).is_dir():
        raise LabError(f"--json {args.json!r} is a folder: give the name of a file")
    if args.tensor_parallel < 1:
        raise LabError(f"--tensor-parallel {args.tensor_parallel}: it must be at least 1")
    if args.tensor_parallel > 1 and sampling.needs_all_logits:
        raise LabError(ONE_PART)
    trace = Trace() if args.trace or args.json else None
    table = read_table(args.dispatch) if args.dispatch is not None else None
    choice = choice_of(args, trace=trace)
    device, ops, overrides = choice.device, choice.ops, args.override or environment_overrides()

    source = open_source(args.model, args.weights)
    group = ranks.join(device)
    if args.tensor_parallel > 1:
        check_ranks(source.config, args.tensor_parallel)
        if group is None:
            ranks.check_devices(device, args.tensor_parallel)
            tokens = args.max_new_tokens if args.max_context is None else args.max_context
            require_parts(
                source, args.tensor_parallel, choice.dtype, device, choice.storage, tokens, choice.kv_dtype
            )
            given = sys.stdin.buffer.read(MAX_PROMPT + 1) if args.prompt == "-" and sys.stdin else b""
            return ranks.start([sys.executable, "-m", "lab", *args.argv], args.tensor_parallel, given)
        if group.ranks != args.tensor_parallel:
            raise LabError(f"--tensor-parallel {args.tensor_parallel}, and {group.ranks} ranks were started")
        group.agree("model", f"{source.where} {source.config}")
        group.connect()
        source = RankSource(source, group.rank, group.ranks)
        if group.rank:
            args.json = None  # rank 0 reports
    formats = choice.formats_of(source)
    tokenizer = find_tokenizer(source, needed=args.ids is None)
    prompt_ids = (
        parse_ids(args.ids) if args.ids is not None else encode(tokenizer, read_prompt(args.prompt), args.raw)
    )
    wrong = [token for token in prompt_ids if not 0 <= token < source.config.vocab]
    if wrong:
        raise LabError(f"token id {wrong[0]} is outside the vocabulary of {source.config.vocab}")
    limit, wanted = source.config.max_positions, len(prompt_ids) + args.max_new_tokens
    max_context = min(wanted, limit) if args.max_context is None else args.max_context
    if len(prompt_ids) > max_context:
        raise LabError(
            f"the prompt has {len(prompt_ids)} tokens and the cache holds {max_context}"
            + (
                f", all that model {source.name} was made for"
                if max_context == limit
                else "; raise --max-context or shorten the prompt"
            )
        )
    source.config.check_context(max_context)
    most_new = max_context - len(prompt_ids) + 1  # the last new token is never read, so it needs no slot
    if table is not None:
        mixed = {**from_table(table, 1, max_context), **parse_overrides(overrides)}
        ops = select(args.backend, device, mixed, trace)

    if slow := slowness(ops, args.plan, device, formats.packed):
        warn(slow)
    weights = load(source, choice.dtype, device, choice.storage, group)
    decoder = Decoder(
        weights,
        ops,
        max_context=max_context,
        page_size=args.page_size,
        plan=args.plan,
        eager=args.eager,
        kv_dtype=choice.kv_dtype,
    )
    streaming = tokenizer is not None and not args.no_stream
    clean = for_terminal if sys.stdout.isatty() else str
    begun = []  # empty until text was shown

    def show(text: str) -> None:
        begun.append(True)
        print(clean(text), end="", flush=True)

    try:
        result = generate(
            decoder,
            prompt_ids,
            min(args.max_new_tokens, most_new),
            sampling,
            tokenizer.eos if tokenizer and not args.ignore_eos else (),
            tokenizer,
            on_text=show if streaming else None,
        )
    except (LabError, KeyboardInterrupt):
        if begun:
            print(flush=True)  # what is said next begins a line
        raise
    shown = result.text if tokenizer else ",".join(map(str, result.output_ids))
    print("" if streaming else clean(shown), flush=True)
    if len(result.output_ids) == most_new < args.max_new_tokens:
        warn(
            f"model {source.name} was made for {limit} tokens, prompt included: it stops there"
            if max_context == limit
            else f"the cache holds {max_context} tokens, prompt included: the text stops there; raise "
            "--max-context"
        )

    backend = args.backend or os.environ["LAB_BACKEND"]
    overrides = {op: chosen for op, chosen in ops.chosen.items() if chosen != backend}
    cached = choice.kv_dtype
    numbers = choice.dtype_name + (f", weights {weights.formats}" if weights.packed else "")
    numbers += f", KV cache {cached}" if cached else ""
    print(summary(result, backend, overrides, args.plan, device, numbers), file=sys.stderr)
    if args.trace:
        for line in columns(
            [(row["op"], row["backend"], row["kernel"], row["calls"]) for row in result.kernels],
            right=(3,),
            indent="  ",
        ):
            print(line, file=sys.stderr)
    if args.json:
        record = {
            "prompt_ids": result.prompt_ids,
            "output_ids": result.output_ids,
            "text": result.text,
            "backend": backend,
            "overrides": overrides,
            "plan": args.plan,
            "device": device,
            "dtype": choice.dtype_name,
            "weights": weights.formats,
            "kv_dtype": cached or choice.dtype_name,
            "kernels": result.kernels,
            "prefill_ms": result.prefill_ms,
            "decode_ms": result.decode_ms,
            "stopped_by": result.stopped_by,
        }
        if args.logprobs is not None:
            record["logprobs"] = [{"logprob": own, "top": top} for own, top in result.logprobs]
        write_whole(args.json, json.dumps(record, indent=1) + "\n")
    if group is not None:
        group.close()
    return 0


def sampling_of(args):
    """The options of sampling. Raises LabError for numbers out of range."""
    from lab.model.sampling import Sampling

    biases = []
    for text in args.logit_bias:
        token, _, bias = text.partition("=")
        try:
            biases.append((integer(token), number(bias)))
        except ValueError:
            raise LabError(f"--logit-bias {shown(text)}: write ID=NUMBER, as in 42=-5") from None
    return Sampling(
        args.temperature,
        args.top_k,
        args.top_p,
        args.seed,
        args.min_p,
        args.repetition_penalty,
        args.presence_penalty,
        args.frequency_penalty,
        tuple(biases),
        args.logprobs,
    )


def find_tokenizer(source, needed: bool):
    """The source's tokenizer. With ids it is not needed: that it is missing is said, and None returned."""
    try:
        tokenizer, why = source.tokenizer(), f"model {source.name} has no tokenizer here"
    except LabError as error:
        tokenizer, why = None, str(error)
    if tokenizer is None and needed:
        raise LabError(why if "--ids" in why else f"{why}; pass token ids with --ids")
    if tokenizer is None:
        warn(f"{why}: no text is shown and no end token is known")
    return tokenizer


def parse_ids(text: str) -> list[int]:
    try:
        return [integer(item) for item in text.split(",")]
    except ValueError:
        raise LabError(f"--ids {shown(text)}: write token ids with commas between, as in 1,2,3") from None


def read_prompt(text: str) -> str:
    """The prompt itself; "-" is standard input without the line break at its end."""
    if text != "-":
        return text
    if sys.stdin is None:
        raise LabError("--prompt -: there is no standard input")
    data = sys.stdin.buffer.read(MAX_PROMPT + 1)
    if len(data) > MAX_PROMPT:
        raise LabError(f"--prompt -: standard input holds more than {MAX_PROMPT >> 20} MiB")
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise LabError("--prompt -: standard input is not valid UTF-8 text") from None


def slowness(ops, plan: str, device: str, packed: bool = False) -> str | None:
    """What to expect of a choice that is slow on a CPU, or None. packed: whether weights are."""
    if device != "cpu":
        return None
    if packed and "torch" in {ops.chosen["linear"], ops.chosen["norm_linear"]}:
        return (
            "torch has no product for packed weights and expands them for every token; --weights-as fp32 or "
            "--backend cuda is faster"
        )
    if plan == "persistent" and ops.chosen["decode_step"] != "torch":
        return (
            f"plan persistent on a CPU emulates a whole GPU ({ops.chosen['decode_step']}): many seconds a "
            "token; --plan basic is faster"
        )
    if "triton" in ops.chosen.values():
        return (
            "on a CPU the Triton kernels are interpreted: seconds a token; --backend torch or cuda is faster"
        )
    return None


def encode(tokenizer, text: str, raw: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that were no UTF-8
        raise LabError("the prompt is not valid UTF-8 text") from None
    if raw or tokenizer.chat_template is None:
        return tokenizer.encode(text)
    return tokenizer.encode_chat([{"role": "user", "content": text}])


def summary(result, backend, overrides, plan, device, dtype) -> str:
    median = statistics.median(result.decode_ms)
    mix = "".join(f", {op}={other}" for op, other in overrides.items())
    emulated = " (emulated)" if device == "cpu" and {backend, *overrides.values()} != {"torch"} else ""
    return (
        f"[{backend}{mix}, plan {plan}, {dtype} on {device}{emulated}]\n"
        f"prompt: {len(result.prompt_ids)} tokens, prefill {result.prefill_ms:.1f} ms\n"
        f"output: {len(result.output_ids)} new tokens ({result.stopped_by}), median {median:.2f} ms a token, "
        f"{1e3 / median:.1f} tokens/s"
    )
