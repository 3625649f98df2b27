"""A model in two lines of Python: lab.load() and LLM.generate(), a thin layer on lab/model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lab.dispatch import Ops, Trace
from lab.errors import LabError
from lab.model.decoder import Decoder
from lab.model.generate import Generation, by_prompt, generate_batch
from lab.model.opening import choose
from lab.model.queue import check_new_tokens
from lab.model.run import encode
from lab.model.sampling import GREEDY, Sampling
from lab.model.sources import open_source
from lab.model.weights import Weights
from lab.model.weights import load as load_weights


def load(
    model: str = "smollm2-135m",
    backend: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    plan: str = "basic",
    overrides: Mapping[str, str] | Sequence[str] = (),
    weights: str = "auto",
    weights_as: str | None = None,
    quantise: str | None = None,
    quantise_head: str | None = None,
    kv_dtype: str | None = None,
    max_batch: int = 8,
    trace: bool = False,
) -> LLM:
    """Reads a model; the options mean what those of `lab run` mean.

    model: a preset, a GGUF file or a Hugging Face folder. backend: "cuda", "triton" or "torch"; None means
    the environment's LAB_BACKEND. overrides: other backends for some ops, as {"rope": "triton"}. device:
    "cuda" or "cpu"; None means a GPU where there is one. dtype: "fp32", "fp16" or "bf16"; None means fp32 on
    a CPU, bf16 on a GPU. plan: "basic", "fused" or "persistent" (which takes a max_batch of 1). weights:
    "random" takes only the model's shape. weights_as, quantise, quantise_head, kv_dtype: formats of the
    weights and of the KV cache. max_batch: the most sequences that are decoded together. trace: count the
    kernels that run, for `Generation.kernels`.

    Raises LabError for an option that is unknown or does not fit the others and for a model that cannot be
    read, Unavailable for a backend that this machine cannot run.
    """
    if max_batch < 1:
        raise LabError(f"max_batch {max_batch}: it must be at least 1")
    counts = Trace() if trace else None
    choice = choose(
        backend,
        overrides,
        device,
        dtype,
        plan,
        weights_as,
        quantise,
        quantise_head,
        kv_dtype,
        rows=max_batch,
        trace=counts,
    )
    source = open_source(model, weights)
    try:
        tokenizer, without = source.tokenizer(), f"model {source.name} has no tokenizer here"
    except LabError as error:  # a model whose tokenizer cannot be read still takes token ids
        tokenizer, without = None, str(error)
    loaded = load_weights(source, choice.dtype, choice.device, choice.storage)
    return LLM(loaded, choice.ops, tokenizer, plan, choice.kv_dtype, max_batch, without)


class LLM:
    """A model on one device, under one choice of backends. Make it by lab.load().

    weights (Weights), ops (what lab.select gave) and tokenizer (or None) may be read.
    """

    def __init__(
        self,
        weights: Weights,
        ops: Ops,
        tokenizer=None,
        plan: str = "basic",
        kv_dtype: str | None = None,
        max_batch: int = 8,
        without: str = "the model was made without a tokenizer",
    ):
        self.weights, self.ops, self.tokenizer = weights, ops, tokenizer
        self.plan, self.kv_dtype, self.max_batch = plan, kv_dtype, max_batch
        self._without = without  # why there is no tokenizer
        self._decoder: Decoder | None = None  # of the last call: its CUDA graphs are used again

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        max_new_tokens: int = 64,
        *,
        raw: bool = False,
        ignore_eos: bool = False,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Generation]:
        """Continues every prompt; the results are in the order of the prompts.

        prompts: texts, which go through the model's chat template if it has one (not if `raw`), or lists of
        token ids. Up to max_batch of them are decoded together, and as one ends the next takes its place;
        prompts that begin alike share that beginning's pages of the KV cache. sampling: greedy by default; a
        list has one for each prompt, one for all gives prompt i its seed plus i. max_new_tokens: the most
        tokens of an answer; it also ends at an end token (not if `ignore_eos`) and at the longest context
        that the model was made for. on_text(i, text): whole characters of the answer to prompts[i], as they
        come.

        A `Generation` has prompt_ids, output_ids (a stop token included), text (None without a tokenizer),
        stopped_by ("stop" or "length"), prefill_ms, decode_ms (the time in ms of each token's step),
        logprobs where the sampling asks for them, and with a trace kernels: those that ran in this call.

        Raises LabError for prompts that are no list, a text where the model has no tokenizer, an empty or too
        long prompt, token ids outside the vocabulary, another number of samplings than of prompts, and logits
        that are not numbers.
        """
        if isinstance(prompts, (str, bytes)):
            raise LabError("prompts must be a list: write generate([text])")
        ids = [self._ids(prompt, raw) for prompt in prompts]
        each = by_prompt(sampling, len(ids))
        check_new_tokens(max_new_tokens)
        if not ids:
            return []
        stop = () if ignore_eos or self.tokenizer is None else self.tokenizer.eos
        decoder = self._decoder_for(min(len(ids), self.max_batch), max(map(len, ids)) + max_new_tokens)
        if self.ops.trace is not None:
            self.ops.trace.counts.clear()
        try:
            return generate_batch(decoder, ids, max_new_tokens, each, stop, self.tokenizer, on_text)
        except KeyboardInterrupt:  # as in a notebook: it may have come while pages changed hands
            self._decoder = None
            raise

    def _ids(self, prompt: str | Sequence[int], raw: bool) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise LabError(f"{self._without}; give lists of token ids")
        return encode(self.tokenizer, prompt, raw)

    def _decoder_for(self, rows: int, tokens: int) -> Decoder:
        """A decoder for at least so many sequences of at least so many tokens, as far as the model goes."""
        tokens = min(tokens, self.weights.config.max_positions)
        old = self._decoder
        if old is None or old.batch < rows or old.cache.max_context < tokens:
            self._decoder = None  # its memory is free before the next one takes its own
            self.weights.config.check_context(tokens)
            self._decoder = Decoder(
                self.weights, self.ops, rows, tokens, plan=self.plan, kv_dtype=self.kv_dtype
            )
        return self._decoder
